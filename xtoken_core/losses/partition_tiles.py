"""partition_kl from hidden states, a few samples at a time: no more than one tile of either side's logits exists at once.

The gradient is formed while running forward, so that a tile's logits need not be kept or formed again. Vocabularies are ordered by cell, which
makes the mass of a cell the sum of neighbouring rows of the transposed probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xtoken_core.losses import partition
from xtoken_core.losses.partition import ComparedChunks, Side, compare, compared_chunks
from xtoken_core.losses.selection import FLOOR, next_token_ids
from xtoken_core.losses.types import Coefficients, HiddenLogits, Logits, TeacherBatch, TermSums, dense
from xtoken_core.spec import LossSpec

ROWS = 2048
"""Rows of logits formed at a time, at least one sample's."""

_ORDERS: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class CellOrder:
    """A vocabulary ordered by cell, tokens without one last."""

    ids: Tensor
    """[V] int64: the id at each place."""
    place: Tensor
    """[V] int64: the place of each id."""
    sizes: Tensor
    """[cells] int64: tokens of each cell."""
    cell: Tensor
    """[kept] int64: the cell at each place that has one."""

    @classmethod
    def of(cls, cells: Tensor, count: int) -> CellOrder:
        """Computed once per tensor of cells."""
        if cells not in _ORDERS:
            key = torch.where(cells < 0, count, cells)
            ids = key.argsort(stable=True)
            sizes = torch.bincount(key, minlength=count + 1)[:count]
            _ORDERS[cells] = cls(ids, ids.argsort(), sizes, key[ids][: int(sizes.sum())])
        order: CellOrder = _ORDERS[cells]
        return order


def with_partition_kl(
    term_sums: Callable[..., TermSums],
    student: Tensor | HiddenLogits,
    input_ids: Tensor,
    token_mask: Tensor,
    sample_mask: Tensor,
    teachers: Sequence[TeacherBatch],
    spec: LossSpec,
    coefficients: Coefficients | None = None,
) -> TermSums:
    """`term_sums`, an implementation that knows every mode but partition_kl, with the teachers of that mode added."""
    ours = [i for i, teacher in enumerate(teachers) if teacher.mode == "partition_kl"]
    if not ours:
        return term_sums(student, input_ids, token_mask, sample_mask, teachers, spec, coefficients)
    others = [i for i in range(len(teachers)) if i not in ours]
    rest = None if coefficients is None else Coefficients(coefficients.ce, coefficients.kd[others])
    sums = term_sums(student, input_ids, token_mask, sample_mask, [teachers[i] for i in others], spec, rest)
    zero = sums.ce.new_zeros(())
    kd = dict.fromkeys(range(len(teachers)), zero) | {i: sums.kd[n] for n, i in enumerate(others)}
    common = torch.zeros(len(teachers), dtype=sums.common.dtype, device=zero.device)
    uncommon = torch.zeros_like(common)
    common[others], uncommon[others] = sums.common, sums.uncommon
    for i in ours:
        chunks = compared_chunks(teachers[i], input_ids, sample_mask, spec)
        kd[i] = partition_kl(student, input_ids, teachers[i], chunks, spec).to(zero.dtype)
    stacked = torch.stack(list(kd.values()))
    if coefficients is None:
        return TermSums(sums.ce, stacked, sums.correct, common, uncommon)
    assert sums.total is not None
    total = sums.total + (coefficients.kd[ours] * stacked[ours]).sum().to(sums.total.dtype)
    return TermSums(sums.ce, stacked.detach(), sums.correct, common, uncommon, total)


def partition_kl(
    student: Tensor | HiddenLogits, student_ids: Tensor, teacher: TeacherBatch, chunks: ComparedChunks, spec: LossSpec
) -> Tensor:
    """As `partition.partition_kl`, differentiable with respect to the student's hidden states and lm_head weight.

    Where either side's logits are there already, or come from a head with a bias, a scale or a soft cap, all of them are formed.
    """
    theirs = teacher.logits
    if not (_plain_head(student) and _plain_head(theirs)):
        return partition.partition_kl(dense(student).log_softmax(-1), dense(theirs), student_ids, teacher, chunks, spec)
    assert isinstance(student, HiddenLogits)
    return _Tiled.apply(student.hidden, student.weight, student, student_ids, teacher, chunks, spec)


def _plain_head(logits: Logits) -> bool:
    return isinstance(logits, HiddenLogits) and logits.bias is None and logits.scale == 1.0 and logits.softcap is None


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, student: HiddenLogits, student_ids: Tensor, *rest: Any) -> Tensor:
        value, of_hidden, of_weight = _sum_and_gradient(student, student_ids, *rest)
        ctx.save_for_backward(of_hidden.to(hidden.dtype), of_weight.to(weight.dtype))
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        of_hidden, of_weight = ctx.saved_tensors
        factor = upstream[0]
        return of_hidden * factor.to(of_hidden.dtype), of_weight * factor.to(of_weight.dtype), None, None, None, None, None


@torch.no_grad()
def _sum_and_gradient(
    student: HiddenLogits, student_ids: Tensor, teacher: TeacherBatch, chunks: ComparedChunks, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    assert teacher.projection is not None and teacher.projection.cells is not None and teacher.input_ids is not None
    assert isinstance(teacher.logits, HiddenLogits)
    cells, theirs = teacher.projection.cells, teacher.logits
    own_order, other_order = CellOrder.of(cells.student, cells.num_cells), CellOrder.of(cells.teacher, cells.num_cells)
    samples, length, dim = student.hidden.shape
    other_length = theirs.shape[1]
    own_weight, other_weight = student.weight[own_order.ids], theirs.weight[other_order.ids]
    own_weight, other_weight = own_weight.to(student.hidden.dtype), other_weight.to(theirs.hidden.dtype)
    own_next = own_order.place[next_token_ids(student_ids)].flatten()
    other_next = other_order.place[next_token_ids(teacher.input_ids)].flatten()
    own_hidden, other_hidden = student.hidden.flatten(0, 1), theirs.hidden.flatten(0, 1)
    of_hidden, of_weight = torch.zeros_like(own_hidden), torch.zeros(own_weight.shape, dtype=torch.float32, device=own_weight.device)
    total = torch.zeros((), dtype=torch.promote_types(student.hidden.dtype, torch.float32), device=own_hidden.device)
    of_weight = of_weight.to(total.dtype)

    step = max(1, ROWS // length)
    starts = torch.arange(0, samples + step, step, device=own_hidden.device)
    bounds = torch.searchsorted(chunks.student_row, starts * length).tolist()  # the chunks of each tile of samples
    for n in range(len(bounds) - 1):
        low, high = bounds[n], bounds[n + 1]
        if low == high:
            continue
        rows = slice(n * step * length, min((n + 1) * step, samples) * length)
        other_rows = slice(n * step * other_length, min((n + 1) * step, samples) * other_length)
        part = slice(low, high)
        own = _probabilities(own_hidden[rows], own_weight)
        other = _probabilities(other_hidden[other_rows], other_weight)
        first, other_first = chunks.student_row[part] - rows.start, chunks.teacher_row[part] - other_rows.start
        sides = (
            _side(own, own_order, first, own_next[rows], chunks.student_chunk[rows], low, high),
            _side(other, other_order, other_first, other_next[other_rows], chunks.teacher_chunk[other_rows], low, high),
        )
        del other
        with torch.enable_grad():
            mass, tokens = sides[0].cells.requires_grad_(), sides[0].tokens.requires_grad_()
            value = compare(*sides, chunks.cell[part], chunks.realised[part], spec)
            of_mass, of_tokens = torch.autograd.grad(value, (mass, tokens))
        total += value.detach()
        own = _of_logits(own, own_order, first, own_next[rows], mass.detach(), of_mass, of_tokens).to(own_hidden.dtype)
        of_hidden[rows] = own.T @ own_weight
        of_weight += own @ own_hidden[rows]
    return total, of_hidden.view(samples, length, dim), of_weight[own_order.place]


def _probabilities(hidden: Tensor, weight: Tensor) -> Tensor:
    """[V, n] in float32 at least: the transposed softmax of the rows' logits."""
    logits = weight @ hidden.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.sub_(logits.amax(0)).exp_()  # softmax over the first dimension is a hundred times slower on GPUs
    return logits.div_(logits.sum(0))


def _side(
    probabilities: Tensor, order: CellOrder, first: Tensor, following: Tensor, chunk: Tensor, low: int, high: int
) -> Side:
    """One side of a tile, whose chunks are low..high-1 of the batch."""
    kept = probabilities[: len(order.cell)]
    mass = torch.segment_reduce(kept.index_select(1, first), "sum", lengths=order.sizes, axis=0, unsafe=True)
    tokens = probabilities.gather(0, following[None])[0].clamp(min=FLOOR).log()
    inside = (chunk >= low) & (chunk < high)
    return Side(mass.clamp(min=FLOOR).log(), tokens, torch.where(inside, chunk - low, high - low))


def _of_logits(
    probabilities: Tensor, order: CellOrder, first: Tensor, following: Tensor, mass: Tensor, of_mass: Tensor, of_tokens: Tensor
) -> Tensor:
    """[V, n]: the gradient with respect to the logits, written over the probabilities.

    d log M_c / d z_j = p_j / M_c within the cell c, less p_j everywhere; d log p_i / d z_j = 1 at i, less p_j everywhere.
    """
    everywhere = of_tokens.index_add(0, first, of_mass.sum(0))
    within = probabilities.new_zeros(len(mass), probabilities.shape[1]).index_copy_(1, first, of_mass * (-mass).exp())
    kept = len(order.cell)
    probabilities[:kept] *= within.index_select(0, order.cell) - everywhere
    probabilities[kept:] *= -everywhere
    return probabilities.scatter_add_(0, following[None], of_tokens[None])
