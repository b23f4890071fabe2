"""Teachers that teach some samples only: a sample weighs the same, taught or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.losses_cases import MODES, random_batch, random_teacher
from tests.support.losses_split import SAMPLES, step
from xtoken_core.losses import (
    StepTotals,
    StudentBatch,
    TeacherBatch,
    batch_counts,
    distillation_loss,
    dynamic_scale,
    loss_sums,
    reference,
)
from xtoken_core.spec import LossSpec

ROWS, LENGTH, VOCAB = 5, 7, 9

flags = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(torch.tensor)


@examples(25)
@given(
    seed=st.integers(0, 10**6),
    taught=st.tuples(st.none() | flags, flags),
    mode=st.sampled_from(MODES),
    scaling=st.sampled_from([False, True, 0.3]),
)
def test_loss_and_gradient_are_the_references(seed, taught, mode, scaling):
    student, ids, mask, samples = random_batch(seed, ROWS, LENGTH, VOCAB)
    spec = LossSpec(mode=mode, vocab_topk=6, dynamic_scaling=scaling)
    teachers = [
        replace(random_teacher(seed + i, ROWS, LENGTH, VOCAB, cross=i == 1, weight=0.5 + i), taught=own)
        for i, own in enumerate(taught)
    ]
    found = distillation_loss(student, ids, mask, samples, teachers, spec)
    (gradient,) = torch.autograd.grad(found.loss, student)
    expected = reference.distillation_loss(student, ids, mask, samples, teachers, spec)
    (truth,) = torch.autograd.grad(expected.loss, student)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(gradient, truth)
    for name, value in expected.metrics.items():
        assert float(found.metrics[name]) == pytest.approx(value, rel=1e-6, abs=1e-9), name


@examples(25)
@given(seed=st.integers(0, 10**6), taught=flags, scaling=st.sampled_from([False, True, 0.3]))
def test_a_sample_weighs_the_same_taught_or_not(seed, taught, scaling):
    """By a teacher that knows the text by heart, KD is CE: then it does not matter whom it teaches."""
    student, ids, mask, samples = random_batch(seed, ROWS, LENGTH, VOCAB)
    by_heart = 1e4 * torch.nn.functional.one_hot(ids.roll(-1, 1), VOCAB).double()
    spec = LossSpec(mode="p_kl", vocab_topk=VOCAB, dynamic_scaling=scaling)
    everywhere = distillation_loss(student, ids, mask, samples, [TeacherBatch(by_heart)], spec)
    somewhere = distillation_loss(student, ids, mask, samples, [TeacherBatch(by_heart, taught=taught)], spec)
    torch.testing.assert_close(somewhere.loss, everywhere.loss)
    for one, other in zip(*(torch.autograd.grad(x.loss, student) for x in (somewhere, everywhere)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches(mode):
    """Some have samples of one teacher, some of none."""
    spec, taught = LossSpec(mode=mode, vocab_topk=5), ([1, 0, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1, 0, 0], [0] * SAMPLES)
    whole = step(spec, [range(SAMPLES)], taught=taught)
    assert whole[1]["kl_loss"] != step(spec, [range(SAMPLES)])[1]["kl_loss"]
    for parts in ([[i] for i in range(SAMPLES)], [range(4), range(4, 8)], [[5, 0], [1, 2, 3], [4, 6, 7]]):
        other = step(spec, parts, taught=taught)
        for a, b in zip(other[0], whole[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
        assert other[1:] == (pytest.approx(whole[1], rel=1e-9), pytest.approx(whole[2], rel=1e-9))


def test_the_scale_stays_where_a_step_has_nothing_that_is_taught():
    student, ids, mask, samples = random_batch(3, ROWS, LENGTH, VOCAB)
    spec, teachers = (
        LossSpec(mode="p_kl"),
        [replace(random_teacher(3, ROWS, LENGTH, VOCAB, cross=True), taught=torch.zeros(ROWS) > 0)],
    )
    totals = StepTotals.from_sums(batch_counts(ids, mask, samples, teachers, spec), teachers, spec, scale=0.4)
    sums = loss_sums(StudentBatch.of(student, ids, mask, samples), teachers, spec, totals)
    assert float(dynamic_scale(sums, totals, spec)) == 0.4
    loss = distillation_loss(student, ids, mask, samples, teachers, spec, totals).loss
    alone = distillation_loss(student, ids, mask, samples, [], spec).loss
    torch.testing.assert_close(loss, 2 * alone)
