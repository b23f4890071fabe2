"""The whole spec: its sections, what must agree between them, and its ways in and out as text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from xtoken_core.errors import InputError
from xtoken_core.spec.data import DataSpec
from xtoken_core.spec.evaluation import EvaluationSpec
from xtoken_core.spec.loss import LossSpec
from xtoken_core.spec.output import OutputSpec
from xtoken_core.spec.resources import ResourcesSpec
from xtoken_core.spec.section import Section
from xtoken_core.spec.student import StudentSpec
from xtoken_core.spec.teachers import TeacherSpec
from xtoken_core.spec.training import TrainingSpec
from xtoken_core.spec_text import apply_override, first_error, parse_yaml

MAX_TEACHERS = 8
"""Teachers of one run: components have one optional input slot per teacher, and KFP wants them spelled out."""


class DistillationSpec(Section):
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
