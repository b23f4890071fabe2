"""partition_kl a few samples at a time: no more than one tile of either side's probabilities exists at once.

The gradient is formed while running forward, so that a tile need not be kept or formed again. Vocabularies are ordered by cell, which makes the
mass of a cell a sum of neighbours. Tiles have the vocabulary first, [V, rows]: PyTorch sums neighbours along the first dimension only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xtoken_core.losses.logits import HiddenLogits, LogitsForm, as_form
from xtoken_core.losses.partition import CellOrder, ComparedChunks, Side, cell_order, compare, compared_chunks
from xtoken_core.losses.selection import FLOOR, next_token_ids
from xtoken_core.losses.types import StudentBatch, TeacherBatch
from xtoken_core.spec import LossSpec

ROWS = 2048
"""Rows formed at a time, at least one sample's."""


Sums = tuple[Tensor, list[Tensor | None]]
"""partition_kl of a batch, 0-dim, and its gradient by the student's tensors."""


def partition_kl(
    student: StudentBatch, teacher: TeacherBatch, spec: LossSpec, implementation: Callable[..., Sums] | None = None
) -> Tensor:
    """Sum over a batch's valid chunks of partition_kl, τ² within, 0-dim in float32 at least.

    Differentiable with respect to what the student's logits are made of. A second backward is not supported.
    implementation: takes what `sum_and_gradients` takes, and answers as it does; None: that one.
    """
    return _Tiled.apply(student, teacher, spec, implementation or sum_and_gradients, *student.logits.tensors)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: StudentBatch, teacher: TeacherBatch, spec: LossSpec, sums: Callable[..., Sums], *tensors: Tensor | None
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        with torch.no_grad():
            value, gradients = sums(student, teacher, compared_chunks(student, teacher, spec), spec, wanted)
        ctx.save_for_backward(*(g if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, tensors)))
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return None, None, None, None, *(None if g is None else g * upstream[0].to(g.dtype) for g in ctx.saved_tensors)


def sum_and_gradients(student: StudentBatch, teacher: TeacherBatch, chunks: ComparedChunks, spec: LossSpec, wanted: bool) -> Sums:
    """The sum, and its gradient by the student's tensors if `wanted` (else an empty list)."""
    assert teacher.projection is not None and teacher.input_ids is not None
    own_form, other_form = student.logits, as_form(teacher.logits)
    samples, length, vocab = own_form.shape
    own = _Vocabulary.of(own_form, teacher.projection.table(cell_order, "student", vocab), student.input_ids)
    other = _Vocabulary.of(other_form, teacher.projection.table(cell_order, "teacher", other_form.shape[2]), teacher.input_ids)
    sums = _Gradients.of(own) if wanted else None
    total = torch.zeros((), dtype=torch.promote_types(own_form.dtype, torch.float32), device=own_form.device)
    step = max(1, ROWS // max(length, 1))
    starts = torch.arange(0, samples + step, step, device=own_form.device)
    bounds = torch.searchsorted(chunks.student_row, starts * length).tolist()  # the chunks of each tile of samples
    for n, (low, high) in enumerate(zip(bounds, bounds[1:])):
        if low == high:
            continue
        part, tile = slice(low, high), slice(n * step, min((n + 1) * step, samples))
        logits = own.logits(tile)
        probabilities = _softmax(logits)
        first = chunks.student_row[part] - tile.start * length
        ours = own.side(probabilities, tile, first, chunks.student_chunk, part)
        theirs = other.side(
            _softmax(other.logits(tile)),
            tile,
            chunks.teacher_row[part] - tile.start * other_form.shape[1],
            chunks.teacher_chunk,
            part,
        )
        with torch.set_grad_enabled(wanted):
            leaves = ours.cells.requires_grad_(wanted), ours.tokens.requires_grad_(wanted)
            value = compare(ours, theirs, chunks.cell[part], chunks.realised[part], spec)
        total += value.detach()
        if sums is not None:
            by = torch.autograd.grad(value, leaves)
            sums.add(tile, logits, own.gradient(probabilities, tile, first, leaves[0].detach(), *by))
    return total, [] if sums is None else sums.finished()


@dataclass(frozen=True)
class _Vocabulary:
    """One side's logits, columns in the order of cells."""

    form: LogitsForm
    order: CellOrder
    following: Tensor
    """[B, T] int64: the place of the token that each row predicts."""

    @classmethod
    def of(cls, form: LogitsForm, order: CellOrder, ids: Tensor) -> _Vocabulary:
        if isinstance(form, HiddenLogits):
            bias = None if form.bias is None else form.bias.detach()[order.ids]
            weight = form.weight.detach()[order.ids].to(form.hidden.dtype)
            form = replace(form, hidden=form.hidden.detach(), weight=weight, bias=bias)
        return cls(form, order, order.place[next_token_ids(ids)])

    def logits(self, tile: slice) -> Tensor:
        """[V, rows] of the samples of a tile."""
        if not isinstance(self.form, HiddenLogits):
            return self.form.over_positions(lambda x: x.detach()[tile]).dense().flatten(0, 1).T[self.order.ids]
        logits = self.form.weight @ self.form.hidden[tile].flatten(0, 1).T
        if self.form.bias is not None:
            logits += self.form.bias.to(logits.dtype)[:, None]
        logits *= self.form.scale
        return logits if self.form.softcap is None else self.form.softcap * (logits / self.form.softcap).tanh()

    def side(self, probabilities: Tensor, tile: slice, first: Tensor, chunk: Tensor, part: slice) -> Side:
        """Its side of the comparison of a tile's chunks, whose first tokens the rows `first` predict."""
        kept = probabilities[: len(self.order.cell)].index_select(1, first)
        mass = torch.segment_reduce(kept, "sum", lengths=self.order.sizes, axis=0, unsafe=True)
        tokens = probabilities.gather(0, self.following[tile].reshape(1, -1))[0]
        own = chunk.view(self.following.shape)[tile].flatten()
        number = torch.where((own >= part.start) & (own < part.stop), own - part.start, part.stop - part.start)
        return Side(mass.clamp(min=FLOOR).log(), tokens.clamp(min=FLOOR).log(), number)

    def gradient(
        self, probabilities: Tensor, tile: slice, first: Tensor, mass: Tensor, by_mass: Tensor, by_tokens: Tensor
    ) -> Tensor:
        """[V, rows]: the gradient by the logits, written over the probabilities.

        d log M_c / d z_j = p_j / M_c within the cell c, less p_j everywhere; d log p_i / d z_j = 1 at i, less p_j everywhere.
        A mass at the floor does not move.
        """
        by_mass = by_mass.masked_fill(mass <= math.log(FLOOR), 0)
        everywhere = by_tokens.index_add(0, first, by_mass.sum(0))
        within = probabilities.new_zeros(len(mass), probabilities.shape[1]).index_copy_(1, first, by_mass * (-mass).exp())
        kept = len(self.order.cell)
        probabilities[:kept] *= within.index_select(0, self.order.cell) - everywhere
        probabilities[kept:] *= -everywhere
        return probabilities.scatter_add_(0, self.following[tile].reshape(1, -1), by_tokens[None])


def _softmax(logits: Tensor) -> Tensor:
    """Over the first dimension, in float32 at least; PyTorch's own is a hundred times slower on GPUs."""
    shifted = logits.to(torch.promote_types(logits.dtype, torch.float32)) - logits.amax(0)
    return shifted.exp_().div_(shifted.sum(0))


@dataclass(frozen=True)
class _Gradients:
    """The gradient by the student's tensors, tile by tile."""

    own: _Vocabulary
    positions: Tensor
    """By the tensor that has positions: hidden states, or the logits themselves."""
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, own: _Vocabulary) -> _Gradients:
        form = own.form
        if not isinstance(form, HiddenLogits):
            assert form.tensors[0] is not None
            return cls(own, torch.zeros_like(form.tensors[0]), None, None)
        wide = torch.promote_types(form.dtype, torch.float32)
        bias = None if form.bias is None else torch.zeros_like(form.bias, dtype=wide)
        return cls(own, torch.zeros_like(form.hidden), torch.zeros_like(form.weight, dtype=wide), bias)

    def add(self, tile: slice, logits: Tensor, gradient: Tensor) -> None:
        """Adds a tile's, from its logits and the gradient by them, both [V, rows]."""
        form, order = self.own.form, self.own.order
        if not isinstance(form, HiddenLogits):
            shape = self.positions[tile].shape
            self.positions[tile] = gradient[order.place].T.reshape(shape).to(self.positions.dtype)
            return
        if form.softcap is not None:
            gradient *= 1 - (logits.to(gradient.dtype) / form.softcap) ** 2
        gradient = (gradient * form.scale if form.scale != 1.0 else gradient).to(form.dtype)
        hidden = form.hidden[tile]
        self.positions[tile] = (gradient.T @ form.weight).view(hidden.shape)
        assert self.weight is not None
        self.weight.add_(gradient @ hidden.flatten(0, 1))
        if self.bias is not None:
            self.bias.add_(gradient.sum(1))

    def finished(self) -> list[Tensor | None]:
        """By each of the student's tensors, in their order."""
        if self.weight is None:
            return [self.positions]
        place = self.own.order.place
        return [self.positions, self.weight[place], None if self.bias is None else self.bias[place]]
