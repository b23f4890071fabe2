"""From sums to the loss of a batch: its share of the loss of the global batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken_core.errors import InputError
from xtoken_core.losses.dispatch import term_sums
from xtoken_core.losses.logits import AveragedLogits, Logits, as_form
from xtoken_core.losses.metrics import dynamic_scale, loss_metrics, sums_vector, untaught_factor
from xtoken_core.losses.resolve import check_sample_mask, check_vocabularies, resolve_teachers, untaught_samples
from xtoken_core.losses.totals import StepTotals, batch_counts
from xtoken_core.losses.types import Coefficients, StudentBatch, TeacherBatch, TermSums
from xtoken_core.spec import LossSpec


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
        """[3 + 3n] float64, additive, without gradient: what the metrics are made of, for `loss_metrics` over a whole step."""
        return sums_vector(self.terms, self.slots, len(self.totals.modes))

    @functools.cached_property
    def metrics(self) -> dict[str, Tensor | float]:
        """0-dim float64 tensors: loss, kl_loss (nats, the aggregated KD), ce_loss (nats per token), kl_loss_scale, accuracy (0..1),
        num_valid_samples (count); per teacher i in the loss: kl_loss_t{i} (nats per chunk, or per token), num_valid_chunks_t{i} (count; for
        p_kl also under NeMo-RL's name num_valid_pairs_t{i}), kl_common_t{i}, l1_uncommon_t{i} (gold, h_kl), weight_t{i} (aggregation sum);
        selected_teacher (select_teacher). With `totals` given: this part's shares of them, which add up, but for counts, weights and scale.
        """
        return loss_metrics(self.sums, self.totals, self.spec)


def distillation_loss(
    student_logits: Logits,
    input_ids: Tensor,
    token_mask: Tensor,
    sample_mask: Tensor,
    teachers: Sequence[TeacherBatch],
    spec: LossSpec,
    totals: StepTotals | None = None,
) -> LossOutput:
    """The distillation loss of a batch: kd_weight * KD + ce_weight * CE, or with dynamic scaling sg(ratio * CE / KD) * KD + CE.

    Samples that no teacher teaches have more of CE in place of KD, so that teachers of some domains do not change what the others weigh.
    Formulas and sources: `reference`. On one whole batch, without `totals`, with `topk_scope: batch`: NeMo-RL's arithmetic.

    Args:
        student_logits: [B, T_s, V_s] float32, bfloat16, float16 or float64, or what forms them.
        input_ids: [B, T_s] int64.
        token_mask: [B, T_s], nonzero where the token counts as a target.
        sample_mask: [B], nonzero where the sample counts. Without `totals` numbers that are not whole are looked for, which on a GPU
            waits for the device; in a mask of booleans there are none.
        teachers: in the spec's order; none: CE alone.
        spec: the loss. `mode: auto` must have been resolved.
        totals: of the global batch that this batch is a part of. The loss is then this part's share: shares add up over
            micro-batches and ranks to the loss of the global batch, and so do their gradients. None: this batch is the global batch.

    Raises:
        InputError (a ValueError): teachers and spec contradict each other, `mode` is `auto`, or a sample counts by a fraction.
    """
    # in training on a GPU the host would wait, and masks are the collator's
    if totals is None or sample_mask.device.type == "cpu":
        check_sample_mask(sample_mask)
    student = StudentBatch.of(student_logits, input_ids, token_mask, sample_mask)
    teachers = resolve_teachers(teachers, input_ids, token_mask, spec)
    check_vocabularies(teachers, student_logits.shape[-1])
    if totals is None:
        counts = batch_counts(input_ids, token_mask, sample_mask, teachers, spec)
        totals = StepTotals.from_sums(counts, teachers, spec)
    elif spec.dynamic_scaling and totals.scale is None:
        raise ValueError("totals.scale: not set; see dynamic_scale")
    slots, active = _active(teachers, spec, totals)
    rest = untaught_samples(sample_mask, teachers)
    if spec.dynamic_scaling and totals.scale is None:
        terms = _with_untaught(term_sums(student, active, spec), student, rest, spec)
        totals = totals.with_scale(dynamic_scale(sums_vector(terms, slots, len(teachers)), totals, spec))
        coefficients = _coefficients(totals, spec, slots)
        loss = (coefficients.ce * terms.ce + (coefficients.kd * terms.kd).sum()).to(terms.ce.dtype)
    else:
        terms = term_sums(student, active, spec, _coefficients(totals, spec, slots))
        assert terms.total is not None
        loss = terms.total
    if rest is not None:
        more = term_sums(replace(student, sample_mask=rest), [], spec, _untaught_coefficients(totals, spec))
        assert more.total is not None
        loss, terms = loss + more.total, replace(terms, untaught=more.ce)
    return LossOutput(loss, terms, slots, totals, spec)


@torch.no_grad()
def loss_sums(student: StudentBatch, teachers: Sequence[TeacherBatch], spec: LossSpec, totals: StepTotals) -> Tensor:
    """The sums of `LossOutput.sums` without a loss: for the scale of a first step, when no step before it has left one."""
    teachers = resolve_teachers(teachers, student.input_ids, student.token_mask, spec)
    check_vocabularies(teachers, student.logits.shape[-1])
    slots, active = _active(teachers, spec, totals)
    rest = untaught_samples(student.sample_mask, teachers)
    return sums_vector(_with_untaught(term_sums(student, active, spec), student, rest, spec), slots, len(teachers))


def _with_untaught(terms: TermSums, student: StudentBatch, rest: Tensor | None, spec: LossSpec) -> TermSums:
    """The terms with the CE of the samples `rest` [B] of the batch, if there are any."""
    return terms if rest is None else replace(terms, untaught=term_sums(replace(student, sample_mask=rest), [], spec).ce.detach())


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
    parts = tuple(as_form(t.logits) for t in teachers)
    return slice(0, 1), [replace(teachers[0], logits=AveragedLogits(parts, tuple(t.weight / weight for t in teachers)))]


def _coefficients(totals: StepTotals, spec: LossSpec, slots: slice) -> Coefficients:
    kd = (totals.kd_weights / totals.kd_counts.clamp(min=1))[slots]
    tokens = totals.tokens.clamp(min=1)
    if spec.dynamic_scaling:
        assert totals.scale is not None
        return Coefficients(1 / tokens, totals.course * totals.scale * kd)
    return Coefficients(spec.ce_weight / tokens, totals.course * spec.kd_weight * kd)


def _untaught_coefficients(totals: StepTotals, spec: LossSpec) -> Coefficients:
    return Coefficients(untaught_factor(totals, spec) / totals.tokens.clamp(min=1), totals.kd_counts[:0])
