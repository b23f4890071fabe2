"""The whole spec: its sections, what must agree between them, and its ways in and out as text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError

from xtoken_core.errors import InputError
from xtoken_core.spec.complaints import complaints
from xtoken_core.spec.data import DataSpec
from xtoken_core.spec.evaluation import EvaluationSpec
from xtoken_core.spec.loss import LossSpec
from xtoken_core.spec.output import OutputSpec
from xtoken_core.spec.pilot import CandidateSpec, PilotSpec
from xtoken_core.spec.resources import ResourcesSpec
from xtoken_core.spec.section import Section
from xtoken_core.spec.student import StudentSpec
from xtoken_core.spec.teachers import TeacherSpec
from xtoken_core.spec.text import MAX_CHARACTERS, apply_override, parse_text
from xtoken_core.spec.training import TrainingSpec


class DistillationSpec(Section):
    """One distillation run, whole."""

    name: str = Field(
        pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        max_length=100,
        description="names the run in pipelines, reports and trackers",
        examples=["llama-1b-from-qwen"],
    )
    student: StudentSpec = Field(description="the model that learns")
    teachers: Annotated[tuple[TeacherSpec, ...], Field(strict=False, min_length=1)] = Field(
        description="the models that are learned from; order fixes teacher_0, teacher_1, ..."
    )
    loss: LossSpec = Field(LossSpec(), description="the distillation loss")
    data: DataSpec = Field(description="documents, and how they become rows")
    training: TrainingSpec = Field(TrainingSpec(), description="the optimisation")
    pilot: PilotSpec | None = Field(
        None,
        description="short runs of several candidates before the main run, and a verdict",
        examples=[{"candidates": [{"name": "all"}]}],
    )
    evaluation: EvaluationSpec = Field(
        EvaluationSpec(), description="what the student, its former self and the teachers are measured on"
    )
    output: OutputSpec = Field(description="where the finished run is published")
    resources: ResourcesSpec = Field(ResourcesSpec(), description="what the steps get on a cluster; a local run ignores it")

    def contradictions(self) -> Iterator[str]:
        """Yields what does not go together between sections, each as `dotted.field: why`."""
        own = list(self._run_contradictions())
        yield from own
        yield from (f"pilot.{why}" for why in self._pilot_contradictions(own))

    def _run_contradictions(self) -> Iterator[str]:
        """What does not go together but for the pilot."""
        for index, teacher in enumerate(self.teachers):
            if teacher.id in [t.id for t in self.teachers[:index]]:
                yield f"teachers.{index} ({teacher.id}): id: used by an earlier teacher"
            yield from (f"teachers.{index} ({teacher.id}): {why}" for why in self._teacher_contradictions(teacher))
        if self.fixed_weights and sum(t.weight for t in self.teachers) == 0:
            yield "teachers: weight: all are zero"
        if self.training.eval_steps is not None and not self.data.validation:
            yield "training.eval_steps: needs data.validation"
        if both := set(self.data.train_uris) & set(self.data.validation):
            yield f"data.validation: {min(both)} is in data.train too"
        if "bits_per_byte" in self.evaluation.model_fields_set and self.evaluation.bits_per_byte and not self.measures_bits:
            yield "evaluation.bits_per_byte: needs evaluation.texts or data.validation"
        yield from (f"output.promote_if: {why}" for why in self._promotion_contradictions())
        if self.student.lora is not None and self.training.sharding == "fsdp":
            yield "student.lora: trains with sharding: ddp only"
        if self.training.attention == "flash_attention_2":
            if self.training.precision == "fp32":
                yield "training.precision: fp32 has no flash_attention_2"
            # transformers looks for packed documents in a batch of one row only
            if self.data.packing and self.training.micro_batch_size > 1:
                yield "training.micro_batch_size: data.packing with flash_attention_2 needs 1"

    def _promotion_contradictions(self) -> Iterator[str]:
        """What of the run leaves its student's promotion undecided."""
        if self.output.promote_if is None:
            return
        if self.output.registry is None:
            yield "needs output.registry"
        if not self.measures_bits:
            yield "needs bits per byte (evaluation.bits_per_byte, and text for it)"
        if self.output.promote_if == "better_than_ce" and not self.evaluation.ce_baseline:
            yield "better_than_ce needs evaluation.ce_baseline"

    def _pilot_contradictions(self, told: Sequence[str]) -> Iterator[str]:
        """What of the run a pilot cannot be made of. told: what every candidate has of the run itself."""
        if self.pilot is None:
            return
        if not self.measures_bits:
            yield "candidates: need bits per byte (evaluation.bits_per_byte, and text for it)"
        if self.pilot.then == "stop" and self.output.registry is not None:
            yield "then: stop leaves no student for output.registry"
        scored = any(teacher.scores is not None for teacher in self.teachers)
        for index, candidate in enumerate(self.pilot.candidates):
            try:
                tried = self.of_candidate(candidate)
            except InputError as e:
                lines = [line for line in str(e).splitlines() if line.removeprefix(f"{candidate.name}: ") not in told]
                yield from (f"candidates.{index}: {line}" for line in lines)
            else:
                if scored and tried.loss.temperature != self.loss.temperature:
                    yield f"candidates.{index}: {candidate.name}: loss.temperature: the scores, which all share, are made at one"

    def of_candidate(self, candidate: CandidateSpec) -> Self:
        """The spec as a candidate of its pilot has it, without the pilot. Raises InputError, which begins with the candidate's name."""
        data = self.model_dump(mode="json", exclude_defaults=True) | {"pilot": None}
        known = [teacher.id for teacher in self.teachers]
        if unknown := [teacher for teacher in candidate.teachers or () if teacher not in known]:
            raise InputError(f"{candidate.name}: teachers: {unknown[0]}: not one of {', '.join(known)}")
        data["teachers"] = [t for t in data["teachers"] if candidate.teachers is None or t["id"] in candidate.teachers]
        return self.from_text(json.dumps(data), candidate.set, source=candidate.name)

    def _teacher_contradictions(self, teacher: TeacherSpec) -> Iterator[str]:
        """What of one teacher contradicts the loss."""
        loss = self.loss
        if teacher.mode is not None and loss.aggregation != "sum":
            yield "mode: a per-teacher mode needs loss.aggregation: sum"
        if teacher.mode not in (None, "p_kl") and loss.exact_match_only:
            yield f"mode: {teacher.mode} contradicts loss.exact_match_only, which is p_kl's"
        mode = teacher.mode or loss.mode
        if teacher.projection is not None and teacher.projection.learnable and mode not in ("p_kl", "auto"):
            yield f"projection.learnable: {mode} does not train W, only p_kl does"
        if "weight" in teacher.model_fields_set and not self.fixed_weights:
            reason = "select_teacher" if loss.aggregation == "select_teacher" else "weight_metric"
            yield f"weight: would be ignored, since loss.{reason} sets the weights"
        if unknown := set(teacher.domains or ()) - {part.domain for part in self.data.parts}:
            yield f"domains: {min(unknown)} is not the domain of a part of data.train"
        if teacher.domains is not None and not loss.separate_terms:
            yield "domains: serve aggregation: sum with fixed weights only"
        if teacher.scores is not None and not loss.separate_terms:
            yield "scores: serve aggregation: sum with fixed weights only"
        if "lead" in teacher.model_fields_set and teacher.lead is not None:
            yield from self._lead_contradictions(teacher)
        if teacher.scores is not None and teacher.cross_tokenizer and mode not in ("partition_kl", "auto"):
            yield f"scores: {mode} needs the running teacher; with a projection they serve partition_kl only"
        if teacher.scores is not None and teacher.scores.uri is not None and self.data.shards > 1:
            yield "scores.uri: stored scores are of one shard of rows, and data.shards is more"
        if loss.aggregation == "averaged_logits":
            if teacher.cross_tokenizer:
                yield "projection: averaged_logits needs teachers with the student's vocabulary"
            if teacher.transport == "topk":
                yield "transport: averaged_logits needs full logits, not topk"

    def _lead_contradictions(self, teacher: TeacherSpec) -> Iterator[str]:
        """Why a lead that is asked for could not be kept."""
        if not self.loss.separate_terms:
            yield "lead: serves aggregation: sum with fixed weights only"
        if teacher.transport == "topk":
            yield "lead: needs what transport: topk does not hand over, the probability of the text"
        if not self.data.validation:
            yield "lead: needs data.validation, on which teacher and student are compared"

    @property
    def fixed_weights(self) -> bool:
        """Whether the teachers' `weight` fields are in force."""
        return self.loss.aggregation == "averaged_logits" or self.loss.separate_terms

    @property
    def ends_with_pilot(self) -> bool:
        """Whether nothing is trained after the pilot."""
        return self.pilot is not None and self.pilot.then == "stop"

    @property
    def measures_bits(self) -> bool:
        """Whether bits per byte are measured: they are asked for, and there is held-out text."""
        return self.evaluation.bits_per_byte and bool(self.evaluation.texts or self.data.validation)

    @property
    def context(self) -> int:
        """Tokens of context that bits per byte are measured with."""
        return self.evaluation.window or self.data.max_length

    @property
    def checkpoint(self) -> Literal["best", "last"]:
        """The student that counts: the best checkpoint, where validation data choose it."""
        return "best" if self.data.validation else "last"

    @property
    def published_student(self) -> str:
        """Where under `output.uri` the student that counts lies."""
        return f"student/{self.checkpoint}"

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Reads a spec file and applies `dotted.key=value` overrides. Raises InputError."""
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), encoding="utf-8") as file:
                os.set_blocking(file.fileno(), True)  # only a pipe that nobody writes to is not waited for
                text = file.read(MAX_CHARACTERS + 1)
        except (OSError, ValueError) as e:  # ValueError: not UTF-8, or no path at all
            raise InputError(f"{path}: cannot read the spec: {getattr(e, 'strerror', None) or e}") from None
        return cls.from_text(text, overrides, source=str(path))

    @classmethod
    def from_text(cls, text: str, overrides: Iterable[str] = (), source: str = "spec") -> Self:
        """Parses YAML (or JSON, which is YAML) and applies overrides. `source` names it in errors.

        Raises InputError with every complaint, one line each.
        """
        data = parse_text(text, source)
        if not isinstance(data, dict):
            raise InputError(f"{source}: a spec is a mapping of fields")
        for override in overrides:
            apply_override(data, override)
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            raise InputError("\n".join(f"{source}: {line}" for line in complaints(e, data, cls))) from None

    def to_json(self) -> str:
        """Canonical one-line JSON, defaults left out; `from_text` reads it back to an equal spec."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True, ensure_ascii=False)
