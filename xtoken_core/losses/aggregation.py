"""From sums to the loss: what is decided once over a whole global batch, and the shares of its parts.

The loss of a global batch is `ce_coefficient * CE sum + Σ_i kd_coefficient_i * KD sum_i`. The sums belong to samples and add up. The
coefficients hold every count, weight, selection and scale; they are decided once per optimizer step from additive vectors, so neither
loss nor gradient depends on how the batch is split into micro-batches and ranks. Nothing here communicates: the caller sums the
vectors over its micro-batches and all-reduces them over the data-parallel group, always, since their layout is fixed by the number of teachers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken_core.errors import InputError
from xtoken_core.losses.dispatch import counted_tokens, term_sums, valid_chunks
from xtoken_core.losses.scores import score_metric, teacher_scores
from xtoken_core.losses.selection import check_sample_mask, check_vocabularies, resolve_teachers
from xtoken_core.losses.types import AveragedLogits, Coefficients, HiddenLogits, TeacherBatch, TermSums, TopKLogits
from xtoken_core.spec import LossSpec

# ------------------------------------------------------------------------------------------------ before the student


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
        [2 + 3n] float64, additive: counted tokens, samples, then per teacher the count its KD is divided by (valid chunks; same
        vocabulary: counted tokens), the sum of its scores and their count.
    """
    device = input_ids.device
    tokens, nothing = counted_tokens(token_mask, sample_mask).double()[None], _constant((0.0, 0.0), device)
    parts = [tokens, _constant((float(input_ids.shape[0]),), device)]
    for i, teacher in enumerate(resolve_teachers(teachers, input_ids, token_mask, spec)):
        score = None if scores is None else scores[i]
        if score is None and score_metric(spec) is not None:
            assert teacher.input_ids is not None and teacher.token_mask is not None
            score = teacher_scores(teacher.logits, teacher.input_ids, teacher.token_mask, sample_mask, spec, teacher.token_bytes)
        count = tokens if teacher.projection is None else valid_chunks(teacher, sample_mask, spec).double()[None]
        parts += [count, nothing if score is None else score.to(device, torch.float64)]
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
    modes: tuple[str | None, ...]
    """p_kl, h_kl or gold per teacher; None: the student's vocabulary."""
    selected: int | None = None
    """select_teacher: the teacher of the lowest CE, the first of equals."""
    scale: Tensor | None = None
    """0-dim: dynamic_scaling's factor of KD; None as long as there is none."""

    @classmethod
    def from_sums(
        cls, sums: Tensor, teachers: Sequence[TeacherBatch], spec: LossSpec, scale: float | Tensor | None = None
    ) -> StepTotals:
        """Decides from the `batch_counts` of the whole global batch.

        Args:
            sums: [2 + 3n], summed over micro-batches and ranks.
            teachers: any batch's; only their weights, modes and vocabularies are read.
            spec: the loss.
            scale: `dynamic_scale` of the step before, with `dynamic_scaling`.
        """
        per_teacher = sums[2:].view(-1, 3)
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
        return cls(sums[0], sums[1], per_teacher[:, 0], weights, factors, modes, selected, scale)

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


# ---------------------------------------------------------------------------------------------------------- the loss


@dataclass(frozen=True)
class LossOutput:
    """The loss of a batch and what to log about it."""

    loss: Tensor
    """0-dim, differentiable."""
    terms: TermSums
    slots: slice
    """The teachers that have a term."""
    totals: StepTotals
    """What the loss was made with."""
    spec: LossSpec

    @functools.cached_property
    def sums(self) -> Tensor:
        """[2 + 3n] float64, additive, without gradient: what the metrics are made of, for `loss_metrics` over a whole step."""
        return _vector(self.terms, self.slots, len(self.totals.modes))

    @functools.cached_property
    def metrics(self) -> dict[str, Tensor | float]:
        """0-dim float64 tensors: loss, kl_loss (nats, the aggregated KD), ce_loss (nats per token), kl_loss_scale, accuracy (0..1),
        num_valid_samples (count); per teacher i in the loss: kl_loss_t{i} (nats per chunk, or per token), num_valid_chunks_t{i} (count; for
        p_kl also under NeMo-RL's name num_valid_pairs_t{i}), kl_common_t{i}, l1_uncommon_t{i} (gold, h_kl), weight_t{i} (aggregation sum);
        selected_teacher (select_teacher). With `totals` given: this part's shares of them, which add up, but for counts, weights and scale.
        """
        return loss_metrics(self.sums, self.totals, self.spec)


def distillation_loss(
    student_logits: Tensor | HiddenLogits,
    input_ids: Tensor,
    token_mask: Tensor,
    sample_mask: Tensor,
    teachers: Sequence[TeacherBatch],
    spec: LossSpec,
    totals: StepTotals | None = None,
    overwrite_logits: bool = False,
) -> LossOutput:
    """The distillation loss of a batch: kd_weight * KD + ce_weight * CE, or with dynamic scaling sg(CE / KD) * KD + CE.

    Formulas and sources: `reference`. On one whole batch, without `totals`, with `topk_scope: batch`: NeMo-RL's arithmetic.

    Args:
        student_logits: [B, T_s, V_s] float32, bfloat16, float16 or float64, or what forms them.
        input_ids: [B, T_s] int64.
        token_mask: [B, T_s], nonzero where the token counts as a target.
        sample_mask: [B], nonzero where the sample counts.
        teachers: in the spec's order; none: CE alone.
        spec: the loss. `mode: auto` must have been resolved.
        totals: of the global batch that this batch is a part of. The loss is then this part's share: shares add up over
            micro-batches and ranks to the loss of the global batch, and so do their gradients. None: this batch is the global batch.
        overwrite_logits: backward may write the gradient over `student_logits`, which saves their size again. The kernels do it for
            contiguous logits, unless a gold or h_kl teacher has to read them meanwhile. A second backward then raises RuntimeError.

    Raises:
        InputError (a ValueError): teachers and spec contradict each other, `mode` is `auto`, or a sample counts by a fraction.
    """
    if (
        totals is None or sample_mask.device.type == "cpu"
    ):  # in training on a GPU the host would wait, and masks are the collator's
        check_sample_mask(sample_mask)
    teachers = resolve_teachers(teachers, input_ids, token_mask, spec)
    check_vocabularies(teachers, student_logits.shape[-1])
    if totals is None:
        counts = batch_counts(input_ids, token_mask, sample_mask, teachers, spec)
        totals = StepTotals.from_sums(counts, teachers, spec)
    elif spec.dynamic_scaling and totals.scale is None:
        raise ValueError("totals.scale: not set; see dynamic_scale")
    slots, active = _active(teachers, spec, totals)
    batch = student_logits, input_ids, token_mask, sample_mask, active, spec

    if spec.dynamic_scaling and totals.scale is None:
        terms = term_sums(*batch, overwrite=overwrite_logits)
        totals = totals.with_scale(dynamic_scale(_vector(terms, slots, len(teachers)), totals, spec))
        coefficients = _coefficients(totals, spec, slots)
        loss = (coefficients.ce * terms.ce + (coefficients.kd * terms.kd).sum()).to(terms.ce.dtype)
    else:
        terms = term_sums(*batch, _coefficients(totals, spec, slots), overwrite=overwrite_logits)
        assert terms.total is not None
        loss = terms.total
    return LossOutput(loss, terms, slots, totals, spec)


@torch.no_grad()
def loss_sums(
    student_logits: Tensor | HiddenLogits,
    input_ids: Tensor,
    token_mask: Tensor,
    sample_mask: Tensor,
    teachers: Sequence[TeacherBatch],
    spec: LossSpec,
    totals: StepTotals,
) -> Tensor:
    """The sums of `LossOutput.sums` without a loss: for the scale of a first step, when no step before it has left one."""
    teachers = resolve_teachers(teachers, input_ids, token_mask, spec)
    check_vocabularies(teachers, student_logits.shape[-1])
    slots, active = _active(teachers, spec, totals)
    return _vector(term_sums(student_logits, input_ids, token_mask, sample_mask, active, spec), slots, len(teachers))


def _active(teachers: list[TeacherBatch], spec: LossSpec, totals: StepTotals) -> tuple[slice, list[TeacherBatch]]:
    """The teachers that have a KD term, and whose slots in the sums they take."""
    if spec.aggregation == "sum" or not teachers:
        return slice(0, len(teachers)), teachers
    if spec.aggregation == "select_teacher":
        assert totals.selected is not None
        chosen = slice(totals.selected, totals.selected + 1)
        return chosen, teachers[chosen]
    weight = sum(t.weight for t in teachers)
    if weight == 0:
        raise InputError("teachers: weight: all are zero")
    parts = tuple(t.logits for t in teachers if not isinstance(t.logits, (TopKLogits, AveragedLogits)))
    return slice(0, 1), [replace(teachers[0], logits=AveragedLogits(parts, tuple(t.weight / weight for t in teachers)))]


def _coefficients(totals: StepTotals, spec: LossSpec, slots: slice) -> Coefficients:
    kd = (totals.weights * totals.factors / totals.kd_counts.clamp(min=1))[slots]
    tokens = totals.tokens.clamp(min=1)
    if spec.dynamic_scaling:
        assert totals.scale is not None
        return Coefficients(1 / tokens, totals.scale * kd)
    return Coefficients(spec.ce_weight / tokens, spec.kd_weight * kd)


# ------------------------------------------------------------------------------------------------ after the student


def _vector(terms: TermSums, slots: slice, num_teachers: int) -> Tensor:
    """[2 + 3n] float64: CE, correct tokens, then per teacher KD, common and uncommon sums (0 for teachers without a term)."""
    per_teacher = torch.stack([terms.kd.detach(), terms.common, terms.uncommon], 1).flatten()
    if len(terms.kd) < num_teachers:
        per_teacher = torch.nn.functional.pad(per_teacher, (3 * slots.start, 3 * (num_teachers - slots.stop)))
    return torch.cat([terms.ce.detach().double()[None], terms.correct[None], per_teacher])


def _means(sums: Tensor, totals: StepTotals) -> tuple[Tensor, Tensor, Tensor]:
    """CE per token [], each teacher's (KD, common, uncommon) per chunk or token [n, 3], and the aggregated KD []."""
    per_teacher = sums[2:].view(-1, 3) / totals.kd_counts.clamp(min=1)[:, None]
    return sums[0] / totals.tokens.clamp(min=1), per_teacher, (totals.weights * totals.factors * per_teacher[:, 0]).sum()


def dynamic_scale(sums: Tensor, totals: StepTotals, spec: LossSpec) -> Tensor:
    """|CE| / |KD| of a step, 0-dim float64: the factor of KD in the next one (1 where KD is 0, or without `dynamic_scaling`).

    `sums` are `LossOutput.sums` (or `loss_sums`) over all micro-batches and ranks. KD over unnormalised columns can be
    negative; its gradient then still points the right way, as in NeMo-RL.
    """
    ce, _, kd = _means(sums, totals)
    scale = ce.abs() / kd.abs()
    return torch.where(kd != 0, scale, 1.0) if spec.dynamic_scaling else torch.ones_like(ce)


def loss_metrics(sums: Tensor, totals: StepTotals, spec: LossSpec) -> dict[str, Tensor | float]:
    """`LossOutput.metrics`, from `LossOutput.sums` over all micro-batches and ranks of a step, say."""
    ce, per_teacher, kd = _means(sums, totals)
    scale = totals.scale if spec.dynamic_scaling and totals.scale is not None else torch.ones_like(ce)
    loss = scale * kd + ce if spec.dynamic_scaling else spec.kd_weight * kd + spec.ce_weight * ce
    metrics: dict[str, Tensor | float] = {"loss": loss, "kl_loss": kd, "ce_loss": ce, "kl_loss_scale": scale}
    metrics |= {"accuracy": sums[1] / totals.tokens.clamp(min=1), "num_valid_samples": totals.samples}
    if spec.aggregation == "averaged_logits":
        return metrics
    if totals.selected is not None:
        metrics["selected_teacher"] = float(totals.selected)
    for i, mode in enumerate(totals.modes):
        if totals.selected not in (None, i):
            continue
        metrics[f"kl_loss_t{i}"] = per_teacher[i, 0]
        if spec.aggregation == "sum":
            metrics[f"weight_t{i}"] = totals.weights[i]
        if mode is not None:
            metrics[f"num_valid_chunks_t{i}"] = totals.kd_counts[i]
        if mode == "p_kl":
            metrics[f"num_valid_pairs_t{i}"] = totals.kd_counts[i]
        elif mode is not None:
            metrics[f"kl_common_t{i}"], metrics[f"l1_uncommon_t{i}"] = per_teacher[i, 1], per_teacher[i, 2]
    return metrics
