"""Distillation from a spec and its prepared inputs to a trained student on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging as transformers_logging

from xtoken_core.data.batch import Collator
from xtoken_core.errors import InputError
from xtoken_core.losses import TeacherBatch
from xtoken_core.losses.learnable import LearnableProjection
from xtoken_core.models import decoder_layers, head_rows, load_model, prune_layers, vocabulary_rows, weight_bytes
from xtoken_core.projection import Projection
from xtoken_core.spec import DistillationSpec, LossSpec, TrainingSpec
from xtoken_core.teachers.handle import Shards, TeacherSetup
from xtoken_core.teachers.pool import TeacherPool
from xtoken_core.tokenization import TokenTable, load_tokenizer
from xtoken_core.training.environment import describe_environment
from xtoken_core.training.log import RunLog
from xtoken_core.training.student import Student
from xtoken_core.training.trackers import trackers
from xtoken_core.training.trainer import LEARNABLE_FILE, STATE_FILE, DistillationTrainer, Progress

logger = logging.getLogger(__name__)

LARGEST_SHARE = 0.6
"""Of a GPU's memory: a teacher whose weights take more is sharded over the ranks, where there are several."""


def distill(
    spec: DistillationSpec,
    modes: dict[str, str],
    rows: Sequence[str | Path],
    projections: Sequence[str | Path | None],
    out_dir: str | Path,
    baseline: bool = False,
    checkpoint_uri: str | None = None,
) -> dict[str, Any]:
    """Trains the student and returns the summary that it also writes.

    With several GPUs, one process per GPU is started, unless torchrun has done so already.

    Args:
        spec: read for student, teachers, loss, data and training.
        modes: loss mode of each cross-tokenizer teacher by id, where neither teacher nor loss fix it.
        rows: folders or URIs of prepared rows, one per shard, each with `train`; the first with `validation` if the spec has such data.
        projections: per teacher the file of its W; None for one with the student's vocabulary.
        out_dir: gets `last` and `best` (by validation bits per byte; folders that AutoModelForCausalLM and AutoTokenizer load), `log.jsonl`,
            `summary.json`, `tensorboard`, `checkpoints`.
        baseline: cross-entropy alone, on the same rows in the same order; no teacher is started.
        checkpoint_uri: folder or URI to keep checkpoints in as well, and to resume from.

    Raises:
        InputError: something named in the message does not fit.
        TeacherError: a teacher process failed.
    """
    arguments = (spec, modes, rows, projections, out_dir, baseline, checkpoint_uri)
    gpus = torch.cuda.device_count()
    if gpus < 2 or "WORLD_SIZE" in os.environ:
        return _distill(*arguments)
    return _on_every_gpu(gpus, arguments)


def _on_every_gpu(gpus: int, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Runs `_distill` in one process per GPU of this host, as torchrun would; the first rank's summary."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(1, 1, gpus, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    try:
        return elastic_launch(config, _distill)(*arguments)[0]
    except ChildFailedError as e:
        words = e.get_first_failure()[1].error_file_data["message"]
        kind, _, text = words["message"].partition(": ") if isinstance(words, dict) else ("", "", "")
        if kind == InputError.__name__:
            raise InputError(text) from None
        raise


def _distill(
    spec: DistillationSpec,
    modes: dict[str, str],
    rows: Sequence[str | Path],
    projections: Sequence[str | Path | None],
    out_dir: str | Path,
    baseline: bool,
    checkpoint_uri: str | None,
) -> dict[str, Any]:
    started = time.monotonic()
    transformers_logging.disable_progress_bar()
    out_dir, first_rank = Path(out_dir), os.environ.get("RANK", "0") == "0"
    out_dir.mkdir(parents=True, exist_ok=True)
    args = training_arguments(spec, out_dir)
    precision = "bf16" if args.bf16 else "fp32"
    if first_rank:
        logger.info("precision: %s", precision)
        _check_inputs(out_dir / "checkpoints", spec, modes, baseline)
    checkpoint = _latest_checkpoint(out_dir / "checkpoints", checkpoint_uri)
    progress = Progress() if checkpoint is None else Progress(**json.loads((checkpoint / STATE_FILE).read_text()))
    if first_rank:
        if checkpoint is None:  # an earlier run's student would pass for this one's best
            for name in ("best", "last"):
                shutil.rmtree(out_dir / name, ignore_errors=True)
        else:
            _restore(checkpoint, out_dir)

    tokenizer = load_tokenizer(spec.student.model, spec.student.tokenizer)
    table = TokenTable.from_tokenizer(tokenizer)
    model = _student_model(spec, checkpoint)
    student_rows = vocabulary_rows(model, len(table), table.min_rows, f"student ({spec.student.model})")
    if not baseline:  # of one vocabulary only the ids that every model has a row for: the others stand for no text
        student_rows = min([student_rows, *(head_rows(t.model) for t in spec.teachers if not t.cross_tokenizer)])
    teachers = (
        []
        if baseline
        else [_teacher(spec, i, modes, table, student_rows, projections[i], args.device) for i in range(len(spec.teachers))]
    )
    learnable = {i: teacher.learnable for i, teacher in enumerate(teachers) if teacher.learnable is not None}
    if checkpoint is not None and learnable:
        for index, weights in load_file(checkpoint / LEARNABLE_FILE).items():
            learnable[int(index)].log_weights.data = weights
    student = Student(model, student_rows, learnable, _loss(spec, baseline))

    def save_projections(folder: Path, learned: dict[int, Tensor]) -> None:
        for index, weights in learned.items():
            teacher = teachers[index]
            assert teacher.learnable is not None and teacher.projection is not None
            learned_projection = LearnableProjection(teacher.projection)
            learned_projection.log_weights.data = weights
            name = folder / f"projection-{spec.teachers[index].id}.safetensors"
            learned_projection.projection().save(name, table.fingerprint, teacher.fingerprint, {"learned": True})

    from xtoken_core.data.prepare import load_rows
    from xtoken_core.data.reading import rows_of_shards
    from xtoken_core.storage import local_copy

    first_rows = local_copy(str(rows[0]))

    resumed = None if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
    with contextlib.ExitStack() as stack:
        callbacks = stack.enter_context(trackers(spec, out_dir, baseline)) if first_rank else []
        log = stack.enter_context(RunLog(out_dir / "log.jsonl", args.max_steps, resumed)) if first_rank else None
        pool = stack.enter_context(TeacherPool([teacher.setup for teacher in teachers])) if teachers else None
        trainer = DistillationTrainer(
            student,
            args,
            collate=Collator.for_rows(spec, first_rows / "train"),
            train_rows=rows_of_shards(spec.data, [str(folder) for folder in rows]),
            validation_rows=load_rows(first_rows / "validation") if spec.data.validation else None,
            tokenizer=tokenizer,
            pool=pool,
            templates=[teacher.template for teacher in teachers],
            teacher_ids=[teacher.id for teacher in spec.teachers[: len(teachers)]],
            projection_rates={i: t.projection.learning_rate for i, t in enumerate(spec.teachers) if t.projection is not None},
            out_dir=out_dir,
            progress=progress,
            log=log,
            save_projections=save_projections,
            publish_checkpoint=lambda folder: _publish(folder, checkpoint_uri),
            callbacks=callbacks,
        )
        ready = time.monotonic()
        with _plainly():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_student(out_dir / "last")
    summary = {
        "steps": trainer.state.global_step,
        "tokens": progress.tokens,
        "seconds": time.monotonic() - started,
        "best_step": progress.best_step,
        "best_validation_bits_per_byte": progress.best_bits_per_byte,
        "last_validation_bits_per_byte": progress.last_bits_per_byte,
        "modes": {t.id: teacher.template.mode or "same_vocabulary" for t, teacher in zip(spec.teachers, teachers)},
        "resumed_from": resumed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "ranks": args.world_size,
        "precision": precision,
        "environment": describe_environment(),
        "seconds_by_phase": {"setup": ready - started, **progress.seconds},
    }
    if first_rank:
        if not (out_dir / "best").exists():  # no validation: the last is the best there is
            shutil.copytree(out_dir / "last", out_dir / "best", copy_function=os.link)
        (out_dir / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """An InputError of one of the data loader's workers comes with the worker's traceback; its last line says it all."""
    try:
        yield
    except InputError as e:
        raise InputError(str(e).strip().rpartition(f"{InputError.__name__}: ")[2]) from e


# -------------------------------------------------------------------------------------------------------- the student


def _student_model(spec: DistillationSpec, checkpoint: Path | None) -> PreTrainedModel:
    """The student in float32, pruned, or as a checkpoint left it."""
    ref = spec.student.model if checkpoint is None else str(checkpoint)
    model = load_model(ref, torch.float32, spec.training.attention, spec.data.packing)
    if checkpoint is None and spec.student.keep_layers is not None:
        prune_layers(model, spec.student.keep_layers)
    return prepare_student(model, spec)


def prepare_student(model: PreTrainedModel, spec: DistillationSpec) -> PreTrainedModel:
    """Sets what the spec's training section asks of the model itself: activation checkpointing, compilation."""
    model.config.use_cache = False
    if spec.training.activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    if spec.training.compile:
        for layer in decoder_layers(model):  # one compilation for all layers, whatever wraps them
            layer.compile()
    return model


def _loss(spec: DistillationSpec, baseline: bool) -> LossSpec:
    """The loss with `auto` out of the way (each teacher has its mode); the baseline's is CE, of weight 1."""
    if baseline:
        return LossSpec(mode="p_kl", dynamic_scaling=True)
    return spec.loss.model_copy(update={"mode": "p_kl"}) if spec.loss.mode == "auto" else spec.loss


# ------------------------------------------------------------------------------------------------------- the teachers


@dataclass(frozen=True)
class _Teacher:
    """One teacher, made ready from the spec."""

    setup: TeacherSetup
    template: TeacherBatch
    fingerprint: str
    projection: Projection | None
    learnable: LearnableProjection | None


def _teacher(
    spec: DistillationSpec,
    index: int,
    modes: dict[str, str],
    student: TokenTable,
    student_rows: int,
    path: str | Path | None,
    device: torch.device,
) -> _Teacher:
    teacher, training = spec.teachers[index], spec.training
    name = f"teachers.{index} ({teacher.id})"
    table, projection, learnable, mode = student, None, None, None
    if teacher.projection is not None:
        if path is None:
            raise InputError(f"{name}: projection: none was given")
        table = TokenTable.from_tokenizer(load_tokenizer(teacher.model, teacher.tokenizer))
        projection = Projection.load(path, student.fingerprint, table.fingerprint)
        mode = teacher.mode or (modes.get(teacher.id) if spec.loss.mode == "auto" else spec.loss.mode)
        if mode is None:
            raise InputError(f"{name}: mode: auto, and the overlap step's choice was not given")
        if teacher.projection.learnable:
            if mode != "p_kl":
                raise InputError(
                    f"{name}: projection.learnable: the overlap step chose {mode}, which does not train W; set mode: p_kl"
                )
            learnable = LearnableProjection(projection)
    scored = spec.loss.weight_metric is not None or spec.loss.aggregation == "select_teacher"
    dtype = compute_dtype(training.precision)
    setup = TeacherSetup(
        name=name,
        model=teacher.model,
        num_ids=len(table) if teacher.cross_tokenizer else student_rows,
        min_rows=table.min_rows,
        transport=teacher.transport,
        top_k=teacher.top_k,
        residency=teacher.residency,
        dtype=dtype,
        attention=training.attention,
        device=device,
        threads=torch.get_num_threads(),
        packed=spec.data.packing,
        shards=_shards(teacher.model, dtype, device),
        scores=_loss(spec, baseline=False) if scored else None,
    )
    on_device = None if projection is None else projection.to(device)
    weight = teacher.weight if spec.fixed_weights else 1.0
    template = TeacherBatch(logits=torch.empty(0), projection=on_device, weight=weight, mode=mode)
    return _Teacher(setup, template, table.fingerprint, projection, learnable)


def _shards(model: str, dtype: torch.dtype, device: torch.device) -> Shards | None:
    """A meeting point for the teacher's processes on all ranks, if the model is too large for one GPU. All ranks call it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or device.type != "cuda":
        return None
    if weight_bytes(model, dtype) <= LARGEST_SHARE * torch.cuda.get_device_properties(device).total_memory:
        return None
    with socket.socket() as free:
        free.bind(("", 0))
        address = [f"{os.environ['MASTER_ADDR']}:{free.getsockname()[1]}"]
    dist.broadcast_object_list(address, src=0)
    return Shards(address[0], dist.get_rank(), ranks)


# ----------------------------------------------------------------------------------------------- transformers' settings


def compute_dtype(precision: str) -> torch.dtype:
    """What `training.precision` means on this machine. `auto`: bfloat16 where the hardware multiplies it; where it does not, it is
    emulated, some thirty times slower than float32 on a CPU with AVX2 alone.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.10 does not tell
        has = known.get("amx_bf16", False) or known.get("avx512_bf16", False)
    return torch.bfloat16 if has else torch.float32


def training_arguments(spec: DistillationSpec, out_dir: Path) -> TrainingArguments:
    """The spec's training section as transformers has it. Raises InputError where rows do not divide over ranks."""
    training, ranks, cuda = spec.training, int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    accumulation = training.accumulation(ranks)
    workers = 2 if cuda else 0
    sharded = training.sharding == "fsdp" and ranks > 1
    return TrainingArguments(
        output_dir=str(out_dir / "checkpoints"),
        max_steps=training.max_steps,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=_scheduler(training),
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        bf16=compute_dtype(training.precision) == torch.bfloat16,
        use_cpu=not cuda,
        ddp_backend=None if cuda or ranks == 1 else "gloo",
        ddp_find_unused_parameters=False,
        fsdp=True if sharded else None,  # type: ignore[arg-type]
        fsdp_config={"version": 2} if sharded else None,
        logging_steps=training.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if spec.data.validation else "no",
        eval_steps=training.eval_steps or training.max_steps,
        eval_on_start=bool(spec.data.validation),
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or training.max_steps,
        save_total_limit=2,
        report_to="none",  # see `trackers`
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=max(2, math.ceil(accumulation / workers)) if workers else None,  # a whole step ahead
        dataloader_pin_memory=cuda,
    )


def _scheduler(training: TrainingSpec) -> str:
    return "constant_with_warmup" if training.scheduler == "constant" and training.warmup_steps else training.scheduler


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _check_inputs(folder: Path, spec: DistillationSpec, modes: dict[str, str], baseline: bool) -> None:
    """Notes in `folder` what its checkpoints are made with. Raises InputError if it holds some of another training."""
    fields = spec.model_dump(mode="json", include={"student", "teachers", "loss", "data", "training"})
    inputs = hashlib.sha256(json.dumps([fields, modes, baseline], sort_keys=True).encode()).hexdigest()
    note = folder / "inputs.sha256"
    if any(folder.glob(f"checkpoint-*/{STATE_FILE}")) and note.exists() and note.read_text() != inputs:
        raise InputError(f"{folder}: holds checkpoints of another spec; remove them, or choose another folder for the run")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(inputs)


def _latest_checkpoint(folder: Path, uri: str | None) -> Path | None:
    """The newest complete checkpoint, in `folder` or kept at `uri`."""
    from xtoken_core.storage import folders, local_copy

    def step(name: str) -> int:
        return int(name.rsplit("-", 1)[1])

    local = [str(path.parent) for path in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    kept = [name for name in folders(uri) if name.rsplit("/", 1)[1].startswith("checkpoint-")] if uri else []
    newest = max([*local, *kept], key=step, default=None)
    if newest is None:
        return None
    logger.info("resuming from %s", newest)
    return Path(newest) if newest in local else local_copy(newest)


def _restore(checkpoint: Path, out_dir: Path) -> None:
    """Brings back what the run has written beside its checkpoints, where it goes on in an empty folder."""
    for name in ("best", "log.jsonl"):
        kept, place = checkpoint / name, out_dir / name
        if kept.is_dir() and not place.exists():
            shutil.copytree(kept, place)
        elif kept.is_file() and not place.exists():
            shutil.copy(kept, place)


def _publish(folder: Path, uri: str | None) -> None:
    """Keeps a checkpoint at `uri`, in place of older ones."""
    if uri is None:
        return
    from xtoken_core.storage import folders, publish, remove

    older = [name for name in folders(uri) if name.rsplit("/", 1)[1].startswith("checkpoint-")]
    publish(folder, f"{uri.rstrip('/')}/{folder.name}")
    for name in older:
        remove(name)
