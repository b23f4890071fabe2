"""A teacher known by its likeliest cells: what is stored of it, and what partition_kl makes of that."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.losses_cases import identity_projection, random_batch, random_segmentation, random_teacher, scored
from xtoken_core.errors import InputError
from xtoken_core.losses import CellCut, HiddenLogits, TeacherBatch, cell_scores, distillation_loss, partition_tiles
from xtoken_core.spec import LossSpec

few = examples(30)
seeds = st.integers(0, 10**6)
B, T, V = 3, 8, 9


def kd(temperature=1.0, reverse=False):
    return LossSpec(
        mode="partition_kl",
        dynamic_scaling=False,
        ce_weight=0.0,
        kd_course="constant",
        temperature=temperature,
        reverse_kl=reverse,
    )


def loss_and_gradient(batch, teacher, spec):
    loss = distillation_loss(*batch, [teacher], spec).loss
    return loss.item(), torch.autograd.grad(loss, batch[0])[0]


@few
@given(seed=seeds, k=st.integers(1, 6), temperature=st.sampled_from([1.0, 0.6, 3.0]))
def test_what_is_listed_is_exact(seed, k, temperature):
    """Masses of the listed cells and of the others, against sums over the vocabulary."""
    teacher = random_teacher(seed, B, T, V, cross=True)
    cells, vocab = teacher.projection.cells, teacher.logits.shape[-1]
    found = CellCut.of(cells, vocab, k, temperature)(teacher.logits, teacher.input_ids)
    p = teacher.logits.softmax(-1)
    one_hot = torch.nn.functional.one_hot(cells.teacher + 1, cells.num_cells + 1)[:, 1:].double()
    masses = (p @ one_hot).clamp(min=2.0**-126)
    listed = found.indices.long()
    torch.testing.assert_close(found.values.exp(), masses.gather(2, listed))
    torch.testing.assert_close(found.total.exp(), masses.sum(-1))
    others = masses.pow(1 / temperature).scatter(2, listed, 0)
    torch.testing.assert_close(found.rest.exp(), others.sum(-1))
    following = teacher.input_ids[:, 1:]
    torch.testing.assert_close(found.realised[:, :-1].exp(), p[:, :-1].gather(2, following[..., None])[..., 0])
    own = cells.teacher[following]
    assert ((listed[:, :-1, 0] == own) | (own < 0)).all()
    assert (found.values[..., 1:-1] >= found.values[..., 2:]).all()
    assert all(len(row.unique()) == len(row) for row in listed.flatten(0, 1))
    if k > 1:  # the first is listed whatever its mass
        assert (others.amax(-1) <= found.values[..., -1].exp().pow(1 / temperature) + 1e-12).all()


@few
@given(seed=seeds, temperature=st.sampled_from([1.0, 0.6, 3.0]), reverse=st.booleans())
def test_with_all_cells_it_is_the_running_teacher(seed, temperature, reverse):
    batch, teacher = random_batch(seed, B, T, V), random_teacher(seed, B, T, V, cross=True)
    live = loss_and_gradient(batch, teacher, kd(temperature, reverse))
    read = loss_and_gradient(batch, scored(teacher, 99, temperature), kd(temperature, reverse))
    assert read[0] == pytest.approx(live[0], rel=1e-10, abs=1e-12)
    torch.testing.assert_close(read[1], live[1], rtol=1e-9, atol=1e-11)


@few
@given(seed=seeds, temperature=st.sampled_from([1.0, 0.6, 3.0]), reverse=st.booleans())
def test_the_loss_grows_with_k_up_to_that_of_the_running_teacher(seed, temperature, reverse):
    """A coarser look at one event tells two distributions apart no better; and no KL is negative."""
    batch, teacher = random_batch(seed, B, T, V), random_teacher(seed, B, T, V, cross=True)
    spec = kd(temperature, reverse)
    losses = [loss_and_gradient(batch, scored(teacher, k, temperature), spec)[0] for k in (1, 2, 3, 4)]
    losses.append(loss_and_gradient(batch, teacher, spec)[0])
    assert losses[0] >= -1e-12
    assert all(few <= more + 1e-10 for few, more in zip(losses, losses[1:]))


@few
@given(seed=seeds, k=st.integers(1, V), temperature=st.sampled_from([1.0, 2.0]), reverse=st.booleans())
def test_a_student_that_is_its_teacher_has_nothing_to_learn(seed, k, temperature, reverse):
    """At any k, in value and gradient."""
    student, ids, mask, samples = random_batch(seed, B, T, V)
    chunks, every = random_segmentation(torch.Generator().manual_seed(seed), B, T, 5), torch.ones(B, 5, dtype=torch.bool)
    teacher = TeacherBatch(student.detach().clone(), ids, mask, chunks, chunks, every, every, identity_projection(V))
    loss, gradient = loss_and_gradient((student, ids, mask, samples), scored(teacher, k, temperature), kd(temperature, reverse))
    assert abs(loss) < 1e-12 and gradient.abs().max() < 1e-12


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"reverse": True}])
def test_derivatives(options):
    """Against finite differences, of hidden states too."""
    student, *rest = random_batch(5, 2, 6, 7)
    spec = kd(**options)
    teacher = scored(random_teacher(4, 2, 6, 7, cross=True), 2, spec.temperature)
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, *rest, [teacher], spec).loss, student)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in ((2, 6, 3), (7, 3))]
    assert torch.autograd.gradcheck(lambda x, w: distillation_loss(HiddenLogits(x, w), *rest, [teacher], spec).loss, leaves)


def test_tiles_change_nothing(monkeypatch):
    """Neither of the loss nor of the cut."""
    batch, teacher = random_batch(5, 4, 6, 7), random_teacher(4, 4, 6, 7, cross=True)
    found = []
    for rows, numbers in ((1, 1), (13, 40), (2048, 2**26)):
        monkeypatch.setattr(partition_tiles, "ROWS", rows)
        monkeypatch.setattr(cell_scores, "_NUMBERS", numbers)
        found.append(loss_and_gradient(batch, scored(teacher, 2), kd()))
    for other in found[1:]:
        assert other[0] == pytest.approx(found[0][0], rel=1e-12)
        torch.testing.assert_close(other[1], found[0][1], rtol=1e-12, atol=1e-14)


def test_a_cell_of_the_text_is_listed_however_unlikely():
    """With one cell listed, it is that of the realised token, whose share stays exact."""
    teacher = random_teacher(1, B, T, V, cross=True)
    cells = teacher.projection.cells
    unlikely = teacher.logits.clone()
    unlikely[:, :-1].scatter_(2, teacher.input_ids[:, 1:, None], -30.0)
    found = scored(replace(teacher, logits=unlikely), 1).logits
    own = cells.teacher[teacher.input_ids[:, 1:]]
    assert (found.indices[:, :-1, 0] == own)[own >= 0].all()
    assert found.realised[:, :-1].max() < math.log(1e-9)


def test_what_cells_do_not_serve_is_refused_by_name():
    batch, teacher = random_batch(0, B, T, V), scored(random_teacher(0, B, T, V, cross=True), 2)
    other = replace(teacher.logits, num_cells=teacher.logits.num_cells + 1)
    cases = [
        (teacher, {"mode": "p_kl"}, "teacher 0: mode: p_kl needs the running teacher; scores of cells serve partition_kl only"),
        (teacher, {"mode": "h_kl"}, "teacher 0: mode: h_kl needs the running teacher"),
        (teacher, {"mode": "partition_kl", "weight_metric": "ce"}, "needs its full logits"),
        (replace(teacher, projection=None), {}, "teacher 0: scores of cells are of a teacher with a projection"),
        (
            replace(teacher, logits=other),
            {"mode": "partition_kl"},
            "teacher 0: scores of 5 cells, and these two vocabularies have 4",
        ),
    ]
    for given_teacher, options, message in cases:
        with pytest.raises(InputError, match=message):
            distillation_loss(*batch, [given_teacher], LossSpec(**options))
