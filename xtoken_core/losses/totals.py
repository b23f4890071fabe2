"""What is decided once over a whole global batch, before the student runs: counts, weights, the selected teacher, the scale.

The loss of a global batch is `ce_coefficient * CE sum + Σ_i kd_coefficient_i * KD sum_i`, and where some samples have no teacher, a third
term of their CE. The sums belong to samples and add up. The coefficients hold every count, weight, selection and scale; they are decided
once per optimizer step from additive vectors, so neither loss nor gradient depends on how the batch is split into micro-batches and ranks. Nothing here communicates: the caller sums the
vectors over its micro-batches and all-reduces them over the data-parallel group, always, since their layout is fixed by the number of teachers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken_core.losses.dispatch import counted_tokens, valid_chunks
from xtoken_core.losses.resolve import resolve_teachers
from xtoken_core.losses.scores import score_metric, teacher_scores
from xtoken_core.losses.types import TeacherBatch
from xtoken_core.spec import LossSpec


@torch.no_grad()
def batch_counts(
    input_ids: Tensor,
    token_mask: Tensor,
    sample_mask: Tensor,
    teachers: Sequence[TeacherBatch],
    spec: LossSpec,
    scores: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """What one batch adds to the denominators and teacher scores of its step.

    Args:
        input_ids: [B, T_s] of the student.
        token_mask: [B, T_s].
        sample_mask: [B].
        teachers: all of them, in the spec's order.
        spec: the loss.
        scores: per teacher `teacher_scores(...)` of this batch, where it was computed elsewhere (in the teacher's process, say).

    Returns:
        [2 + 4n] float64, additive: counted tokens, samples, then per teacher the count its KD is divided by (valid chunks; same
        vocabulary: counted tokens), the sum of its scores, their count, and the counted tokens of the samples that it teaches.
    """
    device = input_ids.device
    tokens, nothing = counted_tokens(token_mask, sample_mask).double()[None], _constant((0.0, 0.0), device)
    parts = [tokens, _constant((float(input_ids.shape[0]),), device)]
    for i, teacher in enumerate(resolve_teachers(teachers, input_ids, token_mask, spec)):
        score = None if scores is None else scores[i]
        if score is None and score_metric(spec) is not None:
            assert teacher.input_ids is not None and teacher.token_mask is not None
            score = teacher_scores(teacher.logits, teacher.input_ids, teacher.token_mask, sample_mask, spec, teacher.token_bytes)
        if teacher.projection is not None:
            count = valid_chunks(teacher, sample_mask, spec).double()[None]
        elif teacher.token_mask is token_mask or teacher.token_mask is None:
            count = tokens
        else:
            count = counted_tokens(teacher.token_mask, sample_mask).double()[None]
        own = tokens if teacher.taught is None else counted_tokens(token_mask, sample_mask * teacher.taught).double()[None]
        parts += [count, nothing if score is None else score.to(device, torch.float64), own]
    return torch.cat(parts)


@dataclass(frozen=True)
class StepTotals:
    """What is decided once for a whole global batch. All tensors float64, without gradient."""

    tokens: Tensor
    """0-dim: counted tokens."""
    samples: Tensor
    """0-dim: samples, masked ones included."""
    kd_counts: Tensor
    """[n]: valid chunks of each teacher; counted tokens for one with the student's vocabulary."""
    weights: Tensor
    """[n]: of each KD in the aggregate."""
    factors: Tensor
    """[n]: log V_i / log min V with `normalize_by_vocab`, else 1; multiplies KD_i beside its weight."""
    shares: Tensor
    """[n]: of the counted tokens, those of samples that each teacher teaches; multiplies KD_i beside its weight."""
    modes: tuple[str | None, ...]
    """The mode of each teacher; None: the student's vocabulary."""
    selected: int | None = None
    """select_teacher: the teacher of the lowest CE, the first of equals."""
    scale: Tensor | None = None
    """0-dim: dynamic_scaling's factor of KD; None as long as there is none."""
    course: float = 1.0
    """What is left of KD's factor at this point of the run (`kd_course`)."""

    @classmethod
    def from_sums(
        cls, sums: Tensor, teachers: Sequence[TeacherBatch], spec: LossSpec, scale: float | Tensor | None = None
    ) -> StepTotals:
        """Decides from the `batch_counts` of the whole global batch.

        Args:
            sums: [2 + 4n], summed over micro-batches and ranks.
            teachers: any batch's; only their weights, modes and vocabularies are read.
            spec: the loss.
            scale: `dynamic_scale` of the step before, with `dynamic_scaling`.
        """
        tokens, samples = sums[:2]
        per_teacher = sums[2:].view(-1, 4)
        modes = tuple(None if t.projection is None else t.mode or spec.mode for t in teachers)
        growth = [math.log(_vocabulary(t)) if spec.normalize_by_vocab else 1.0 for t in teachers]
        factors = _constant(tuple(g / min(growth) for g in growth), sums.device)

        def scores() -> Tensor:
            return per_teacher[:, 1] / per_teacher[:, 2].clamp(min=1)

        selected = None
        if spec.aggregation == "select_teacher" and teachers:
            costs = scores().tolist()
            selected = costs.index(min(costs))
            weights = _constant(tuple(float(i == selected) for i in range(len(teachers))), sums.device)
        elif spec.aggregation == "averaged_logits":  # one KD, that of the average, which counts as teacher 0's
            weights = _constant(tuple(float(i == 0) for i in range(len(teachers))), sums.device)
        elif spec.weight_metric is not None:
            sign = 1.0 if spec.weight_metric == "max_prob" else -1.0
            weights = (spec.alpha * sign * scores() * factors).softmax(0)
        else:
            weights = _constant(tuple(float(t.weight) for t in teachers), sums.device)
        if scale is not None:
            scale = torch.as_tensor(scale, dtype=torch.float64, device=sums.device)
        shares = torch.where(per_teacher[:, 3] == tokens, 1.0, per_teacher[:, 3] / tokens.clamp(min=1))
        return cls(tokens, samples, per_teacher[:, 0], weights, factors, shares, modes, selected, scale)

    @property
    def kd_weights(self) -> Tensor:
        """[n]: of each teacher's mean KD in the aggregate."""
        return self.weights * self.factors * self.shares

    def with_scale(self, scale: float | Tensor) -> StepTotals:
        """The same with dynamic scaling's factor set."""
        return replace(self, scale=torch.as_tensor(scale, dtype=torch.float64, device=self.tokens.device))


@functools.lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float64 [n] on the device, copied there once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64, device=device)


def _vocabulary(teacher: TeacherBatch) -> int:
    """The ids of a teacher's tokenizer, columns of padding left out."""
    columns = teacher.logits.shape[-1]
    known = None if teacher.projection is None else teacher.projection.teacher_vocab_size
    return columns if known is None else min(columns, known)
