"""The same global batch as 1 x 8, 2 x 4 and 8 x 1 micro-batches, and unevenly: one loss, one gradient."""

from __future__ import annotations

import pytest
import torch

from tests.support.losses_split import SAMPLES, SPECS, cut, global_batch, step
from xtoken_core.losses import StepTotals, batch_counts, distillation_loss, teacher_scores


def assert_equal_steps(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
    assert one[1] == pytest.approx(other[1], rel=1e-9)
    assert one[2] == pytest.approx(other[2], rel=1e-9)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.mode}-{s.aggregation}-{s.weight_metric}-{s.chunk_distribution}")
def test_micro_batches(spec):
    whole = step(spec, [range(SAMPLES)])
    for size in (1, 4):
        assert_equal_steps(step(spec, [range(i, i + size) for i in range(0, SAMPLES, size)]), whole)
    later = step(spec, [range(SAMPLES)], scale=whole[2])
    assert_equal_steps(step(spec, [[5, 0], [1, 2, 3], [4, 6, 7]], scale=whole[2]), later)


def test_micro_batches_of_scored_teachers():
    spec = SPECS[0]
    whole = step(spec, [range(SAMPLES)], from_scores=True)
    assert whole[1]["kl_loss_t0"] != step(spec, [range(SAMPLES)])[1]["kl_loss_t0"]
    for parts in ([[i] for i in range(SAMPLES)], [range(4), range(4, 8)], [[5, 0], [1, 2, 3], [4, 6, 7]]):
        assert_equal_steps(step(spec, parts, from_scores=True), whole)


@pytest.mark.parametrize("spec", SPECS[:1] + SPECS[-3:], ids=lambda s: f"{s.aggregation}-{s.chunk_distribution}")
def test_the_first_step_is_the_loss_of_the_batch(spec):
    """Without a step before, the scale is of this step's own sums: what the call without totals answers."""
    model, batch, teachers = global_batch(spec)
    student, parts = cut(batch, teachers, model, torch.arange(SAMPLES))
    out = distillation_loss(*student, parts, spec)
    (loss, *gradients), metrics, _ = step(spec, [range(SAMPLES)])
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-12)
    assert metrics == pytest.approx({name: float(value) for name, value in out.metrics.items()}, rel=1e-12)
    head = torch.autograd.grad(out.loss, model.head)[0]
    torch.testing.assert_close(gradients[0], head.flatten())


def test_scores_may_come_from_elsewhere():
    """The teacher's process computes them: the counts are the same."""
    spec = SPECS[1]
    model, batch, teachers = global_batch(spec)
    (_, ids, mask, samples), parts = cut(batch, teachers, model, torch.arange(SAMPLES))
    scores = []
    for teacher in parts:
        own = (ids, mask) if teacher.projection is None else (teacher.input_ids, teacher.token_mask)
        scores.append(teacher_scores(teacher.logits, *own, samples, spec, teacher.token_bytes))
    for given in (scores, [scores[0], None, scores[2]]):
        torch.testing.assert_close(
            batch_counts(ids, mask, samples, parts, spec, scores=given), batch_counts(ids, mask, samples, parts, spec)
        )


def test_totals_without_a_scale_are_an_error():
    spec = SPECS[0]
    model, batch, teachers = global_batch(spec)
    student, parts = cut(batch, teachers, model, torch.arange(SAMPLES))
    totals = StepTotals.from_sums(batch_counts(*student[1:], parts, spec), parts, spec)
    with pytest.raises(ValueError, match="scale"):
        distillation_loss(*student, parts, spec, totals=totals)
