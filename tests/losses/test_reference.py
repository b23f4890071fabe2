"""The vectorised losses against `reference`, on random shapes, masks, segmentations and options, in every dtype."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.losses_cases import MODES, random_batch, random_teacher, scored
from xtoken_core.errors import InputError
from xtoken_core.losses import HiddenLogits, TopKLogits, distillation_loss, reference
from xtoken_core.losses.learnable import LearnableProjection
from xtoken_core.spec import LossSpec

few = examples(50)


@st.composite
def cases(draw, dtype=torch.float64, dynamic=(True, False)):
    """A batch, its teachers and a spec that fit together."""
    seed = draw(st.integers(0, 10**6))
    batch, length, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(3, 10))
    aggregation = draw(st.sampled_from(["sum", "sum", "sum", "averaged_logits", "select_teacher"]))
    metric = draw(st.sampled_from([None, "ce", "entropy", "max_prob"])) if aggregation == "sum" else None
    mode = draw(st.sampled_from(MODES))
    exact = mode == "p_kl" and draw(st.booleans())
    scaled = draw(st.sampled_from(dynamic)) and draw(st.sampled_from([True, 0.3]))
    spec = LossSpec(
        mode=mode,
        chunk_distribution=draw(st.sampled_from(["mean", "first"])),
        topk_scope=draw(st.sampled_from(["sequence", "batch"])),
        vocab_topk=draw(st.sampled_from([1, 4, 8192])),
        uncommon_topk=draw(st.sampled_from([1, 3, 8192])),
        temperature=draw(st.sampled_from([1.0, 0.7, 2.0])),
        reverse_kl=draw(st.booleans()),
        exact_match_only=exact,
        kd_weight=1.0 if scaled else draw(st.sampled_from([1.0, 0.3])),
        ce_weight=0.1 if scaled else draw(st.sampled_from([0.1, 0.0])),
        dynamic_scaling=scaled,
        aggregation=aggregation,
        weight_metric=metric,
        alpha=0.7 if metric else 1.0,
        normalize_by_vocab=aggregation == "sum" and draw(st.booleans()),
        score_unit=draw(st.sampled_from(["token", "byte"])) if metric == "ce" or aggregation == "select_teacher" else "token",
    )
    teachers = []
    for i in range(draw(st.integers(1, 3))):
        cross = aggregation != "averaged_logits" and draw(st.booleans())
        own = draw(st.sampled_from((None, *MODES))) if cross and aggregation == "sum" and not exact else None
        teacher = random_teacher(seed + i, batch, length, vocab, cross, dtype, weight=0.2 + i, mode=own)
        if cross:  # an lm_head may have rows of padding, with any logits
            padding = torch.full((*teacher.logits.shape[:2], draw(st.integers(0, 2))), 5.0, dtype=dtype)
            teacher = dataclasses.replace(teacher, logits=torch.cat([teacher.logits, padding], -1))
            listed = draw(st.sampled_from([None, 1, 2, 99]))
            if listed and aggregation == "sum" and metric is None and (own or mode) == "partition_kl":
                teacher = scored(teacher, listed, spec.temperature)
        teachers.append(teacher)
    return random_batch(seed, batch, length, vocab, dtype), teachers, spec


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0].double()


def assert_agree(batch, teachers, spec, tolerance, gradient_tolerance):
    expected = reference.distillation_loss(*batch, teachers, spec)
    assume(not spec.dynamic_scaling or abs(expected.metrics["kl_loss"]) > 1e-4)  # CE / KD of a KD of rounding errors is noise
    actual = distillation_loss(*batch, teachers, spec)
    assert actual.loss.dtype == torch.promote_types(batch[0].dtype, torch.float32)
    assert set(actual.metrics) == set(expected.metrics)
    assert {k: float(v) for k, v in actual.metrics.items()} == pytest.approx(expected.metrics, rel=tolerance, abs=tolerance)
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance, abs=tolerance)
    if batch[0].dtype != torch.float64 and any((teacher.mode or spec.mode) == "partition_kl" for teacher in teachers):
        gradient_tolerance *= 10  # the rest of a cell beside a chunk that is nearly all of it: a difference of equal numbers
    truth = gradient(expected.loss, batch[0])
    error = torch.linalg.vector_norm(gradient(actual.loss, batch[0]) - truth)
    assert error <= gradient_tolerance * (torch.linalg.vector_norm(truth) + 0.05)


@few
@given(cases())
def test_float64(case):
    assert_agree(*case, tolerance=1e-9, gradient_tolerance=1e-9)


@few
@given(cases(torch.float32, dynamic=(False,)))
def test_float32(case):
    assert_agree(*case, tolerance=2e-5, gradient_tolerance=1e-4)


@few
@given(cases(torch.bfloat16, dynamic=(False,)))
def test_bfloat16(case):
    """The loss is computed in float32 from bfloat16 logits; only the gradient is rounded, 8 bits, once."""
    assert_agree(*case, tolerance=2e-5, gradient_tolerance=2**-7)


def hidden_student(seed, batch, length, vocab, softcap, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, 5, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, 5, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(vocab, generator=generator, dtype=dtype).requires_grad_()
    return HiddenLogits(hidden, weight, bias, scale=0.7, softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mode", MODES)
def test_hidden_states_of_both_models(mode, softcap):
    """Logits formed from hidden states are those logits, for the student and the teacher, and so are the gradients."""
    _, *rest = random_batch(3, 2, 7, 9)
    student = hidden_student(1, 2, 7, 9, softcap)
    teacher = random_teacher(0, 2, 7, 9, cross=True)
    formed = hidden_student(2, *teacher.logits.shape, softcap)
    spec = LossSpec(mode=mode, vocab_topk=4, dynamic_scaling=False, aggregation="sum", weight_metric="ce")
    leaves = student.hidden, student.weight, student.bias
    lazy = distillation_loss(student, *rest, [dataclasses.replace(teacher, logits=formed)], spec).loss
    dense = distillation_loss(student.dense(), *rest, [dataclasses.replace(teacher, logits=formed.dense())], spec).loss
    truth = reference.distillation_loss(student, *rest, [dataclasses.replace(teacher, logits=formed)], spec).loss
    assert lazy.item() == pytest.approx(truth.item(), rel=1e-10)
    assert dense.item() == pytest.approx(truth.item(), rel=1e-10)
    for a, b, c in zip(*(torch.autograd.grad(loss, leaves) for loss in (lazy, dense, truth)), strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


def test_averaged_hidden_states():
    student, *rest = random_batch(3, 2, 5, 6)
    teachers = [random_teacher(i, 2, 5, 6, cross=False, weight=0.5 + i) for i in range(2)]
    formed = hidden_student(2, 2, 5, 6, 3.0)
    spec = LossSpec(aggregation="averaged_logits")
    lazy, dense = (
        distillation_loss(student, *rest, [dataclasses.replace(teachers[0], logits=logits), teachers[1]], spec)
        for logits in (formed, formed.dense())
    )
    assert lazy.loss.item() == pytest.approx(dense.loss.item(), rel=1e-12)


@few
@given(seed=st.integers(0, 10**6), topk=st.sampled_from([1, 3, 5, 99]), k=st.sampled_from([1, 2, 4, 7]), reverse=st.booleans())
def test_top_k_teacher(seed, topk, k, reverse):
    """A teacher known by its k largest logits: the reference's loss, and with k = V the loss of the full logits."""
    batch = random_batch(seed, 2, 5, 7)
    full = random_teacher(seed, 2, 5, 7, cross=False)
    values, indices = full.logits.topk(k)
    top = dataclasses.replace(full, logits=TopKLogits(values, indices.int(), 7))
    spec = LossSpec(vocab_topk=topk, reverse_kl=reverse, dynamic_scaling=False)
    assert_agree(batch, [top], spec, tolerance=1e-10, gradient_tolerance=1e-10)
    if k == 7:
        losses = [distillation_loss(*batch, [teacher], spec).loss for teacher in (top, full)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
        torch.testing.assert_close(*(gradient(loss, batch[0]) for loss in losses))


@pytest.mark.parametrize("distribution", ["mean", "first"])
def test_learnable_projection(distribution):
    """Row-softmax weights start as W, train through p_kl alone, and empty rows and single entries stay what they are."""
    batch = random_batch(5, 2, 8, 9)
    teacher = random_teacher(4, 2, 8, 9, cross=True)
    learnable = LearnableProjection(teacher.projection).double()
    torch.testing.assert_close(learnable().weights, teacher.projection.weights.double())
    spec = LossSpec(mode="p_kl", chunk_distribution=distribution, vocab_topk=6, dynamic_scaling=False)
    losses = [
        call(*batch, [dataclasses.replace(teacher, projection=learnable())], spec).loss
        for call in (distillation_loss, reference.distillation_loss)
    ]
    actual, expected = (gradient(loss, learnable.log_weights) for loss in losses)
    torch.testing.assert_close(actual, expected)
    multiple = (learnable.indices >= 0).sum(1) > 1
    assert actual[multiple].abs().sum() > 0
    assert actual[~multiple].abs().max() < 1e-15
    learnable.log_weights.data += torch.randn_like(learnable.log_weights)
    trained = learnable.projection()
    torch.testing.assert_close(trained.weights.sum(1), (trained.indices >= 0).any(1).double())
    assert not trained.weights.requires_grad
    assert learnable().indices is learnable().indices


def test_a_fractional_sample_mask_is_refused():
    logits, ids, mask, samples = random_batch(0, 2, 6, 11)
    with pytest.raises(InputError, match=r"^sample_mask: 0\.5 is neither 0 nor 1"):
        distillation_loss(logits, ids, mask, samples * 0.5, [], LossSpec(mode="p_kl"))
