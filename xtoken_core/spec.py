"""The spec: every option of the system, its default and its bounds, in one place.

`DistillationSpec.from_yaml(path, overrides)` is the way in. Unknown keys, duplicate keys, contradictions and bad
values raise `InputError` with one line that names the field. Loading touches no model, data or network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from xtoken_core.errors import InputError
from xtoken_core.spec_text import apply_override, first_error, parse_yaml

Mode = Literal["p_kl", "h_kl", "gold"]

MAX_TEACHERS = 8
"""Teachers of one run: components have one optional input slot per teacher, and KFP wants them spelled out."""

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Quantity = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
"""An amount as Kubernetes writes it, of which YAML takes some for numbers."""


class _Section(BaseModel):
    """Settings shared by every section: immutable, no unknown keys, no silent coercion, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StudentSpec(_Section):
    """The model that learns."""

    model: str = Field(min_length=1, description="hub id, local folder, fsspec URI (s3://...) or a .gguf file")
    tokenizer: str | None = Field(None, description="where its tokenizer lies; default: with the model")
    keep_layers: PositiveInt | Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="depth pruning before distillation: layer indices, or a count spread evenly; null keeps all"
    )

    @model_validator(mode="after")
    def _layers_ascend(self) -> Self:
        if isinstance(self.keep_layers, tuple) and list(self.keep_layers) != sorted(set(self.keep_layers)):
            raise ValueError("keep_layers: layer indices must ascend, each once")
        return self


class ProjectionSpec(_Section):
    """How the projection matrix W (student vocabulary x teacher vocabulary) of one teacher is made."""

    uri: str | None = Field(None, description="reuse a stored W (.safetensors, or NeMo-RL's .pt) in place of building one")
    top_k: PositiveInt = Field(4, description="entries kept per student token")
    reverse_pass: bool = Field(False, description="also map the teacher's tokens back through the student's tokenizer")
    learnable: bool = Field(False, description="train the weights of W's nonzeros with the student")
    learning_rate: PositiveFloat = Field(1e-2, description="of W's weights, when learnable")

    @model_validator(mode="after")
    def _stored_or_built(self) -> Self:
        if self.uri is not None and {"top_k", "reverse_pass"} & self.model_fields_set:
            raise ValueError("uri: a stored projection is taken as it is; top_k and reverse_pass only apply to one that is built")
        if not self.learnable and "learning_rate" in self.model_fields_set:
            raise ValueError("learning_rate: only used with learnable: true")
        return self


class TeacherSpec(_Section):
    """One teacher. Order in the spec fixes its index (teacher_0, teacher_1, ...)."""

    id: str = Field(pattern=r"^[a-z0-9-]+$", description="names the teacher in tasks, metrics and errors")
    model: str = Field(min_length=1, description="hub id, local folder, fsspec URI or a .gguf file")
    tokenizer: str | None = Field(None, description="where its tokenizer lies; default: with the model")
    projection: ProjectionSpec | None = Field(None, description="{}: build W; absent or null: the student's own vocabulary")
    weight: NonNegativeFloat = Field(1.0, description="fixed weight: aggregation sum without weight_metric, averaged_logits")
    mode: Mode | None = Field(None, description="this teacher's loss mode (aggregation sum only); default: loss.mode")
    transport: Literal["hidden", "logits", "topk"] = Field("hidden", description="what the teacher process hands over")
    top_k: PositiveInt | None = Field(None, description="logits per position handed over by transport topk")
    residency: Literal["auto", "resident", "offload"] = Field(
        "auto", description="whether its weights stay on the GPU between steps"
    )

    @property
    def cross_tokenizer(self) -> bool:
        """Whether the teacher's vocabulary differs from the student's (it has a projection)."""
        return self.projection is not None

    @model_validator(mode="after")
    def _id_is_free(self) -> Self:
        if self.id in ("step", "data", "teachers"):
            raise ValueError(f"id: {self.id} is taken: the training log has a seconds_{self.id} of its own")
        return self

    @model_validator(mode="after")
    def _transport_fits(self) -> Self:
        if self.transport == "topk" and self.cross_tokenizer:
            raise ValueError("transport: topk needs a teacher with the student's vocabulary, and this one has a projection")
        if (self.transport == "topk") != (self.top_k is not None):
            raise ValueError("top_k: goes with transport: topk, each needs the other")
        if self.mode is not None and not self.cross_tokenizer:
            raise ValueError("mode: only means something for a teacher with a projection")
        return self


class LossSpec(_Section):
    """The distillation loss; formulas in DESIGN and `xtoken_core/losses/reference.py`."""

    mode: Literal["p_kl", "h_kl", "gold", "auto"] = Field("auto", description="auto: the coverage audit decides per teacher")
    chunk_distribution: Literal["mean", "first"] = Field(
        "mean", description="mean over a chunk's rows, or its first row renormalised"
    )
    topk_scope: Literal["sequence", "batch"] = Field("sequence", description="over what the teacher columns are chosen")
    vocab_topk: PositiveInt = Field(8192, description="teacher columns that p_kl and the same-vocabulary KL compare")
    uncommon_topk: PositiveInt = Field(8192, description="sorted uncommon probabilities that gold and h_kl compare")
    temperature: PositiveFloat = 1.0
    reverse_kl: bool = False
    exact_match_only: bool = Field(False, description="p_kl: only chunks whose text is equal on both sides")
    kd_weight: NonNegativeFloat = Field(1.0, description="factor of KD without dynamic scaling")
    ce_weight: NonNegativeFloat = Field(0.1, description="factor of CE without dynamic scaling")
    dynamic_scaling: bool = Field(True, description="rescale KD to the size of CE; kd_weight and ce_weight are then unused")
    aggregation: Literal["sum", "averaged_logits", "select_teacher"] = "sum"
    weight_metric: Literal["ce", "entropy", "max_prob"] | None = Field(None, description="weight teachers by their confidence")
    alpha: float = Field(1.0, description="sharpness of weight_metric's softmax")
    normalize_by_vocab: bool = Field(False, description="scale each KD (and score) by log V_i / log min V")
    score_unit: Literal["token", "byte"] = Field("token", description="of the CE that weights or selects teachers")

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.aggregation != "sum":
            for field in ("weight_metric", "normalize_by_vocab"):
                if getattr(self, field):
                    raise ValueError(f"{field}: only with aggregation: sum")
        if self.exact_match_only and self.mode != "p_kl":
            raise ValueError("exact_match_only: only with mode: p_kl")
        if self.weight_metric is None and "alpha" in self.model_fields_set and self.alpha != 1.0:
            raise ValueError("alpha: only used with weight_metric")
        if self.score_unit == "byte" and not (self.aggregation == "select_teacher" or self.weight_metric == "ce"):
            raise ValueError("score_unit: byte only applies to select_teacher and to weight_metric: ce")
        for field in ("kd_weight", "ce_weight"):
            if self.dynamic_scaling and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field}: not used with dynamic_scaling: true")
        return self


class DataSpec(_Section):
    """Documents and how they become rows."""

    train: Annotated[Strings, Field(min_length=1)] = Field(
        description="files, folders or globs: .txt (one document each), .jsonl, .parquet"
    )
    validation: Strings = Field((), description="same; chooses the best checkpoint")
    format: Literal["text", "messages"] = "text"
    text_key: str = Field("text", description="column of the text in .jsonl and .parquet")
    messages_key: str = Field("messages", description="column of the chat in .jsonl and .parquet, format: messages")
    assistant_only: bool = Field(True, description="format: messages: KD and CE only on assistant turns")
    max_length: Annotated[int, Field(ge=8)] = Field(2048, description="tokens of a row, on every side")
    max_rows: PositiveInt | None = Field(None, description="use only the first rows of the training data")
    packing: bool = Field(False, description="several documents a row, attention kept within each")
    shards: PositiveInt = Field(1, description="parallel prepare tasks, each over its share of the documents")

    @model_validator(mode="after")
    def _format_fits(self) -> Self:
        unused = {"text": ("messages_key", "assistant_only"), "messages": ("text_key",)}[self.format]
        for field in unused:
            if field in self.model_fields_set and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field}: not used with format: {self.format}")
        return self


class TrainingSpec(_Section):
    """The optimisation; names follow transformers.TrainingArguments where it has them."""

    max_steps: PositiveInt = Field(1000, description="optimizer steps")
    global_batch_size: PositiveInt = Field(64, description="rows of one optimizer step, over all ranks")
    micro_batch_size: PositiveInt = Field(1, description="rows of one forward pass on one rank")
    learning_rate: PositiveFloat = 1e-5
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="bf16: autocast over float32 weights; auto: bf16 where GPU or CPU has instructions for it, else fp32"
    )
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile the student")
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    sharding: Literal["ddp", "fsdp"] = Field("ddp", description="how the student spreads over several GPUs")
    log_steps: PositiveInt = 1
    eval_steps: PositiveInt | None = Field(None, description="validate this often; default: only at the end")
    save_steps: PositiveInt | None = Field(None, description="checkpoint this often; default: never")
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], Field(strict=False)] = Field(
        ("tensorboard",), description="trackers; their servers and credentials come from the environment (WANDB_*, MLFLOW_*)"
    )

    @model_validator(mode="after")
    def _steps_and_batches_fit(self) -> Self:
        if self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} leaves nothing of max_steps {self.max_steps}")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size: {self.global_batch_size} is no multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    def accumulation(self, ranks: int) -> int:
        """Micro-batches of a rank in one step. Raises InputError unless a step's rows divide over so many ranks."""
        accumulation, rest = divmod(self.global_batch_size, self.micro_batch_size * ranks)
        if rest:
            raise InputError(
                f"training.global_batch_size: {self.global_batch_size} rows do not divide over {ranks} ranks "
                f"by micro-batches of {self.micro_batch_size}"
            )
        return accumulation


class EvaluationSpec(_Section):
    """What the student, its former self and the teachers are measured on."""

    bits_per_byte: bool = Field(True, description="where there is held-out text")
    texts: Strings = Field((), description="held-out documents for bits per byte; default: data.validation")
    window: Annotated[int, Field(ge=8)] | None = Field(None, description="context in tokens; default: data.max_length")
    tasks: Strings = Field((), description="lm-evaluation-harness tasks, suites or task folders")
    num_fewshot: NonNegativeInt | None = Field(None, description="shots of the tasks; default: each task's own")
    limit: PositiveInt | None = Field(None, description="examples per task; default: all")
    ce_baseline: bool = Field(False, description="also train a twin on cross-entropy alone, same rows and steps")


class OutputSpec(_Section):
    """Where the finished run is published."""

    uri: str = Field(min_length=1, description="folder or fsspec URI; a finished run appears there whole or not at all")


class SecretEnv(_Section):
    """An environment variable filled from a Kubernetes secret; its value is never in the spec."""

    secret: str = Field(min_length=1)
    key: str = Field(min_length=1)
    env: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")


class Toleration(_Section):
    """A Kubernetes toleration of the GPU steps."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _operator_fits(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("value: only with operator: Equal")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("key: operator Equal needs one")
        return self


class VolumeClaim(_Section):
    """An existing PersistentVolumeClaim and where the steps see it."""

    name: str = Field(min_length=1)
    mount_path: str = Field(pattern=r"^/")


class ResourcesSpec(_Section):
    """What the steps get on a cluster; a local run ignores all of it."""

    image: str = Field(
        "registry.example.org/xtoken:unset", description="image of every step: your build of manifests/Dockerfile, by digest"
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    gpus_per_node: NonNegativeInt = Field(1, description="GPUs of training; evaluations take one each; 0: CPU only")
    nodes: PositiveInt = Field(1, description="hosts of the distill step; more than one runs as a Kubeflow TrainJob")
    gpu_type: str = Field("nvidia.com/gpu", description="Kubernetes resource name of the accelerator")
    cpu: Quantity = Field("8", pattern=r"^([0-9]+(\.[0-9]+)?|[0-9]+m)$")
    memory: Quantity = Field("64Gi", pattern=r"^[0-9]+(Ki|Mi|Gi|Ti|M|G|T)?$", description="KFP takes whole numbers alone")
    shm: Quantity = Field(
        "16Gi", pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$", description="size of the in-memory /dev/shm"
    )
    retries: NonNegativeInt = Field(
        2, description="of training, which goes on from its last checkpoint (see training.save_steps), and of every step after it"
    )
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: Annotated[tuple[Toleration, ...], Field(strict=False)] = ()
    secrets: Annotated[tuple[SecretEnv, ...], Field(strict=False)] = ()
    pvc: Annotated[tuple[VolumeClaim, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _mounts_differ(self) -> Self:
        paths = [claim.mount_path.rstrip("/") for claim in self.pvc]
        for index, path in enumerate(paths):
            if path in paths[:index]:
                raise ValueError(f"pvc.{index}.mount_path: {path} is an earlier claim's")
        return self

    def keeps(self, path: str) -> bool:
        """Whether a local path lies on one of the volumes, and so outlives the pod that writes it."""
        return any(path.startswith(f"{claim.mount_path.rstrip('/')}/") for claim in self.pvc)


class DistillationSpec(_Section):
    """One distillation run, whole."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=100)
    student: StudentSpec
    teachers: Annotated[tuple[TeacherSpec, ...], Field(strict=False, min_length=1, max_length=MAX_TEACHERS)]
    loss: LossSpec = LossSpec()
    data: DataSpec
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    output: OutputSpec
    resources: ResourcesSpec = ResourcesSpec()

    @model_validator(mode="after")
    def _teachers_agree(self) -> Self:
        ids = [t.id for t in self.teachers]
        for index, teacher in enumerate(self.teachers):
            where = f"teachers.{index} ({teacher.id})"
            if teacher.id in ids[:index]:
                raise ValueError(f"{where}: id: used by an earlier teacher")
            if teacher.mode is not None and self.loss.aggregation != "sum":
                raise ValueError(f"{where}: mode: a per-teacher mode needs loss.aggregation: sum")
            if teacher.mode not in (None, "p_kl") and self.loss.exact_match_only:
                raise ValueError(f"{where}: mode: {teacher.mode} contradicts loss.exact_match_only, which is p_kl's")
            mode = teacher.mode or self.loss.mode
            if teacher.projection is not None and teacher.projection.learnable and mode not in ("p_kl", "auto"):
                raise ValueError(f"{where}: projection.learnable: {mode} does not train W, only p_kl does")
            if "weight" in teacher.model_fields_set and not self.fixed_weights:
                reason = "select_teacher" if self.loss.aggregation == "select_teacher" else "weight_metric"
                raise ValueError(f"{where}: weight: would be ignored, since loss.{reason} sets the weights")
            if self.loss.aggregation == "averaged_logits":
                if teacher.cross_tokenizer:
                    raise ValueError(f"{where}: projection: averaged_logits needs teachers with the student's vocabulary")
                if teacher.transport == "topk":
                    raise ValueError(f"{where}: transport: averaged_logits needs full logits, not topk")
        if self.fixed_weights and sum(t.weight for t in self.teachers) == 0:
            raise ValueError("teachers: weight: all are zero")
        if self.training.eval_steps is not None and not self.data.validation:
            raise ValueError("training.eval_steps: needs data.validation")
        if both := set(self.data.train) & set(self.data.validation):
            raise ValueError(f"data.validation: {min(both)} is in data.train too")
        if "bits_per_byte" in self.evaluation.model_fields_set and self.evaluation.bits_per_byte and not self.measures_bits:
            raise ValueError("evaluation.bits_per_byte: needs evaluation.texts or data.validation")
        return self

    @model_validator(mode="after")
    def _flash_attention_can_run(self) -> Self:
        if self.training.attention == "flash_attention_2":
            if self.training.precision == "fp32":
                raise ValueError("training.precision: fp32 has no flash_attention_2")
            # transformers looks for packed documents in a batch of one row only
            if self.data.packing and self.training.micro_batch_size > 1:
                raise ValueError("training.micro_batch_size: data.packing with flash_attention_2 needs 1")
        return self

    @property
    def fixed_weights(self) -> bool:
        """Whether the teachers' `weight` fields are in force."""
        return self.loss.aggregation == "averaged_logits" or (self.loss.aggregation == "sum" and self.loss.weight_metric is None)

    @property
    def measures_bits(self) -> bool:
        """Whether bits per byte are measured: they are asked for, and there is held-out text."""
        return self.evaluation.bits_per_byte and bool(self.evaluation.texts or self.data.validation)

    # ---------------------------------------------------------------------------------------------- in and out

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Reads a spec file and applies `dotted.key=value` overrides. Raises InputError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{path}: cannot read the spec: {getattr(e, 'strerror', None) or e}") from None
        return cls.from_text(text, overrides, source=str(path))

    @classmethod
    def from_text(cls, text: str, overrides: Iterable[str] = (), source: str = "spec") -> Self:
        """Parses YAML (or JSON, which is YAML) and applies overrides. `source` names it in errors. Raises InputError."""
        data = parse_yaml(text, source)
        if not isinstance(data, dict):
            raise InputError(f"{source}: a spec is a mapping of fields")
        for override in overrides:
            apply_override(data, override)
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            raise InputError(f"{source}: {first_error(e, data)}") from None

    def to_json(self) -> str:
        """Canonical one-line JSON, defaults left out; `from_text` reads it back to an equal spec."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True, ensure_ascii=False)
