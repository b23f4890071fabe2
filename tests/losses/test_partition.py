"""partition_kl: a hand computation, derivatives, tiles of any size, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.support.losses_cases import random_batch, random_teacher
from xtoken_core.errors import InputError
from xtoken_core.losses import HiddenLogits, StepTotals, TeacherBatch, batch_counts, distillation_loss, partition_tiles
from xtoken_core.partition import Partition
from xtoken_core.projection import Projection
from xtoken_core.spec import LossSpec

KD = LossSpec(mode="partition_kl", dynamic_scaling=False, ce_weight=0.0)


def one_chunk(student_logits, teacher_logits) -> tuple:
    """The text "ab": two tokens a, b of a student with {a, b, c}, the token ab of a teacher with {a, ab, b}; cells {a, ab}, {b}."""
    cells = Partition(torch.tensor([0, 1, -1]), torch.tensor([0, 0, 1]), 2)
    w = Projection(torch.tensor([[0], [2], [-1]]), torch.tensor([[1.0], [1.0], [0.0]]), 3, cells=cells)
    one = torch.ones(1, 1, dtype=torch.bool)
    ids, chunk = torch.tensor([[2, 0, 1]]), torch.tensor([[-1, 0, 0]])
    teacher = TeacherBatch(teacher_logits, torch.tensor([[0, 1]]), torch.ones(1, 2), chunk, torch.tensor([[-1, 0]]), one, one, w)
    return (student_logits, ids, torch.ones(1, 3), torch.ones(1)), [teacher]


@pytest.mark.parametrize("reverse", [False, True])
def test_by_hand(reverse):
    """First row: {a, ab} and {b} renormalised without c; then the cell of a cut into the text ab and the rest."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [1 / 3] * 3], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.6, 0.3], [1 / 3] * 3], dtype=torch.float64)
    batch, teachers = one_chunk(p.log()[None].requires_grad_(), q.log()[None])
    loss = distillation_loss(*batch, teachers, KD.model_copy(update={"reverse_kl": reverse})).loss

    def kl(a, b):
        a, b = (b, a) if reverse else (a, b)
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    cell_s, cell_t = 0.5 / 0.8, 0.7
    expected = kl(cell_t, cell_s) + (cell_s if reverse else cell_t) * kl(0.6 / 0.7, 0.5 * 0.6 / 0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"reverse_kl": True}])
@pytest.mark.parametrize("hidden", [False, True])
def test_derivatives(options, hidden):
    """Of logits, and of hidden states with bias, scale and soft cap, against finite differences."""
    student, *rest = random_batch(5, 2, 6, 7)
    teacher = random_teacher(4, 2, 6, 7, cross=True)
    spec = KD.model_copy(update=options)
    if not hidden:
        assert torch.autograd.gradcheck(lambda x: distillation_loss(x, *rest, [teacher], spec).loss, student)
        return
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in ((2, 6, 3), (7, 3), (7,))]

    def loss(x, weight, bias):
        return distillation_loss(HiddenLogits(x, weight, bias, 0.5, 3.0), *rest, [teacher], spec).loss

    assert torch.autograd.gradcheck(loss, leaves)


def test_tiles_change_nothing(monkeypatch):
    student, *rest = random_batch(5, 4, 6, 7)
    teacher = random_teacher(4, 4, 6, 7, cross=True)
    found = []
    for rows in (1, 13, 2048):
        monkeypatch.setattr(partition_tiles, "ROWS", rows)
        loss = distillation_loss(student, *rest, [teacher], KD).loss
        found.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-14)


def test_the_numbers_of_chunks_change_nothing():
    batch, teacher = random_batch(5, 4, 6, 7), random_teacher(4, 4, 6, 7, cross=True)
    number = torch.randperm(teacher.chunk_valid.shape[1], generator=torch.Generator().manual_seed(1))
    place = number.argsort()
    other = replace(
        teacher,
        student_chunk_id=torch.where(teacher.student_chunk_id < 0, -1, number[teacher.student_chunk_id]),
        teacher_chunk_id=torch.where(teacher.teacher_chunk_id < 0, -1, number[teacher.teacher_chunk_id]),
        chunk_valid=teacher.chunk_valid[:, place],
        chunk_exact=teacher.chunk_exact[:, place],
    )
    one, two = (distillation_loss(*batch, [t], KD).loss for t in (teacher, other))
    assert one.item() == pytest.approx(two.item(), rel=1e-12) and one > 0


def test_what_no_cell_holds_counts_on_neither_side():
    """Tokens without a cell may have any probability."""
    p = torch.randn(1, 3, 3, dtype=torch.float64)
    batch, teachers = one_chunk(p, torch.randn(1, 2, 3, dtype=torch.float64))
    more = p + torch.tensor([0.0, 0.0, 3.0])
    more[0, 1:] = p[0, 1:]  # of the row that predicts the chunk's first token
    first = LossSpec(mode="partition_kl", dynamic_scaling=False, ce_weight=0.0)
    inexact = [replace(teachers[0], chunk_exact=torch.zeros(1, 1, dtype=torch.bool))]
    one, other = (distillation_loss(x, *batch[1:], inexact, first).loss for x in (p, more))
    assert one.item() == pytest.approx(other.item(), rel=1e-12)


def test_a_projection_without_cells_is_refused():
    teacher = random_teacher(0, 2, 6, 7, cross=True)
    teacher = replace(teacher, projection=replace(teacher.projection, cells=None))
    with pytest.raises(InputError, match="teacher 0: mode: partition_kl needs the cells"):
        distillation_loss(*random_batch(0, 2, 6, 7), [teacher], KD)


@pytest.mark.parametrize("scaling", [True, False, 0.3])
def test_the_course_scales_kd_alone(scaling):
    """Half of the course is half of KD in the loss and its gradient; the next step's scale knows nothing of it."""
    batch, teachers = random_batch(1, 2, 6, 7), [random_teacher(0, 2, 6, 7, cross=True)]
    spec = LossSpec(mode="partition_kl", dynamic_scaling=scaling, **({} if scaling else {"ce_weight": 0.7}))
    totals = StepTotals.from_sums(batch_counts(*batch[1:], teachers, spec), teachers, spec, scale=0.4)
    ce, full, half = (distillation_loss(*batch, teachers, spec, replace(totals, course=c)) for c in (0.0, 1.0, 0.5))
    assert half.loss.item() == pytest.approx((ce.loss.item() + full.loss.item()) / 2, rel=1e-12)
    assert half.loss.item() == pytest.approx(float(half.metrics["loss"]), rel=1e-6)
    assert torch.equal(half.sums, full.sums)
