"""partition_kl a few samples at a time: no more than one tile of either side's probabilities exists at once.

The gradient is formed while running forward, so that a tile need not be kept or formed again. Vocabularies are ordered by cell, which makes the
mass of a cell a sum of neighbours. Tiles have the vocabulary first, [V, rows]: PyTorch sums neighbours along the first dimension only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtoken_core.losses.cell_scores import CellScores
from xtoken_core.losses.logits import HiddenLogits, as_form
from xtoken_core.losses.ordered import OrderedLogits, probabilities_of
from xtoken_core.losses.partition import ComparedChunks, Side, cell_order, compare, compared_chunks
from xtoken_core.losses.selection import next_token_ids
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
            value, gradients = sums(student, teacher, spec, wanted)
        ctx.save_for_backward(*(g if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, tensors)))
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return None, None, None, None, *(None if g is None else g * upstream[0].to(g.dtype) for g in ctx.saved_tensors)


def sum_and_gradients(student: StudentBatch, teacher: TeacherBatch, spec: LossSpec, wanted: bool) -> Sums:
    """The sum, and its gradient by the student's tensors if `wanted` (else an empty list)."""
    chunks = compared_chunks(student, teacher, spec)
    form, projection = student.logits, teacher.projection
    assert projection is not None
    samples, length, vocab = form.shape
    own = OrderedLogits.of(form, projection.table(cell_order, "student", vocab), next_token_ids(student.input_ids))
    other = _teacher_side(teacher, chunks, spec)
    sums = _Gradients.of(own) if wanted else None
    total = torch.zeros((), dtype=torch.promote_types(form.dtype, torch.float32), device=form.device)
    step = max(1, ROWS // max(length, 1))
    starts = torch.arange(0, samples + step, step, device=form.device)
    bounds = torch.searchsorted(chunks.student_row, starts * length).tolist()  # the chunks of each tile of samples
    for n, (low, high) in enumerate(zip(bounds, bounds[1:])):
        if low == high:
            continue
        part, tile = slice(low, high), slice(n * step, min((n + 1) * step, samples))
        logits = own.logits(tile)
        probabilities = probabilities_of(logits)
        first = chunks.student_row[part] - tile.start * length
        number = _numbers(chunks.student_chunk.view(samples, length)[tile], part)
        ours = Side(own.masses(probabilities.index_select(1, first)), own.log_probs(probabilities, tile), number)
        theirs = other(tile, part, ours.cells)
        with torch.set_grad_enabled(wanted):
            leaves = ours.cells.requires_grad_(wanted), ours.tokens.requires_grad_(wanted)
            value = compare(ours, theirs, chunks.cell[part], chunks.realised[part], spec)
        total += value.detach()
        if sums is not None:
            by = torch.autograd.grad(value, leaves)
            sums.add(tile, logits, own.gradient(probabilities, tile, first, leaves[0].detach(), *by))
    return total, [] if sums is None else sums.finished()


TeacherSide = Callable[[slice, slice, Tensor], Side]
"""From a tile's samples, its chunks and the student's masses [cells, n] of them, to the teacher's side."""


def _teacher_side(teacher: TeacherBatch, chunks: ComparedChunks, spec: LossSpec) -> TeacherSide:
    assert teacher.projection is not None and teacher.input_ids is not None
    form = as_form(teacher.logits)
    samples, length, vocab = form.shape
    chunk = chunks.teacher_chunk.view(samples, length)

    def scored(tile: slice, part: slice, student: Tensor) -> Side:
        assert isinstance(form, CellScores)
        rows = chunks.teacher_row[part]
        tokens, total = form.realised[tile].flatten(), form.total.flatten()[rows]
        cells = form.cells(rows, student, spec.temperature)
        return Side(cells, tokens.to(cells.dtype), _numbers(chunk[tile], part), total.to(cells.dtype))

    if isinstance(form, CellScores):
        return scored
    order = teacher.projection.table(cell_order, "teacher", vocab)
    logits = OrderedLogits.of(form, order, next_token_ids(teacher.input_ids))

    def live(tile: slice, part: slice, student: Tensor) -> Side:
        probabilities = probabilities_of(logits.logits(tile))
        first = chunks.teacher_row[part] - tile.start * length
        masses = logits.masses(probabilities.index_select(1, first))
        return Side(masses, logits.log_probs(probabilities, tile), _numbers(chunk[tile], part))

    return live


def _numbers(chunk: Tensor, part: slice) -> Tensor:
    """[rows]: the realised chunk of each row of a tile, counted from the first of its chunks; the last one more for none of them."""
    own = chunk.flatten()
    return torch.where((own >= part.start) & (own < part.stop), own - part.start, part.stop - part.start)


@dataclass(frozen=True)
class _Gradients:
    """The gradient by the student's tensors, tile by tile."""

    own: OrderedLogits
    positions: Tensor
    """By the tensor that has positions: hidden states, or the logits themselves."""
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, own: OrderedLogits) -> _Gradients:
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
