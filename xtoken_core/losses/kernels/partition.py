"""partition_kl from hidden states, at τ = 1 and not reversed: masses of cells, their KL, and the gradient by the logits, each in one pass.

A tile's first columns are the rows that predict the chunks' first tokens, in the order of the chunks on both sides; then come the rows that
predict further tokens of realised chunks, and of the student all others that count: the cross-entropy comes from the same logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.cell_scores import CellScores
from xtoken_core.losses.kernels.autograd import scaled
from xtoken_core.losses.kernels.cell_masses import BLOCK, COLUMNS, SPLITS, CellSide, CellVocabulary
from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.kernels.scored_cells import ScoredSide
from xtoken_core.losses.kernels.sources import HiddenGradients
from xtoken_core.losses.logits import HiddenLogits, Logits
from xtoken_core.losses.partition import ComparedChunks, chunk_sums, compared_chunks, realised_part
from xtoken_core.losses.selection import FLOOR, next_token_mask
from xtoken_core.losses.types import StudentBatch, TeacherBatch
from xtoken_core.spec import LossSpec

TILE_CHUNKS = 2048
"""Chunks of a tile."""


@triton.jit
def _kl_kernel(
    student,
    teacher,
    scales,
    out,
    floored,
    cells,
    columns,
    per_split,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[split, column]: Σ Q_T (log Q_T - log Q_S) over the cells of a split; scales [4, columns]: 1 / Z and Z / N of both sides.

    floored[split, column]: Σ Q_T over those where the student's mass is at the floor and does not move.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * per_split
    inverse_s, kept_s = tl.load(scales + column)[None, :], tl.load(scales + columns + column)[None, :]
    inverse_t, kept_t = tl.load(scales + 2 * columns + column)[None, :], tl.load(scales + 3 * columns + column)[None, :]
    total = tl.zeros([COLUMNS], tl.float32)
    still = tl.zeros([COLUMNS], tl.float32)
    for c in range(first, first + per_split, BLOCK):
        cell = c + tl.arange(0, BLOCK)
        at = cell.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (cell < cells)[:, None]
        mass = tl.load(student + at, mask=inside, other=1.0) * inverse_s
        s = tl.maximum(mass, FLOOR) * kept_s
        t = tl.maximum(tl.load(teacher + at, mask=inside, other=1.0) * inverse_t, FLOOR) * kept_t
        total += tl.sum(tl.where(inside, t * (tl.log(t) - tl.log(s)), 0.0), 0)
        still += tl.sum(tl.where(inside & (mass <= FLOOR), t, 0.0), 0)
    tl.store(out + tl.program_id(1) * columns + column, total)
    tl.store(floored + tl.program_id(1) * columns + column, still)


@triton.jit
def _gradient_kernel(
    logits, maxima, student, teacher, cell, scales, realised, of_cell, of_tokens, everywhere, following, factor, vocab, cells, columns, compared,
    FLOOR: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient by the logits, written over them; scales as in `_kl_kernel`, compared: the columns of first tokens.

    of_cell: the derivative by the log mass of the cell `realised`, without `factor`; of_tokens: by the log probability of the token
    `following`; everywhere: the sum of the derivatives by all log masses and log probabilities that move.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (place < vocab)[:, None]
    at = place.to(tl.int64)[:, None] * columns + column[None, :]
    c = tl.load(cell + place, mask=place < vocab, other=0)
    inverse_s, kept_s = tl.load(scales + column)[None, :], tl.load(scales + columns + column)[None, :]
    inverse_t, kept_t = tl.load(scales + 2 * columns + column)[None, :], tl.load(scales + 3 * columns + column)[None, :]
    p = (
        tl.exp(tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32) - tl.load(maxima + column)[None, :])
        * inverse_s
    )
    told = inside & (c < cells)[:, None] & (column < compared)[None, :]
    mass_at = c.to(tl.int64)[:, None] * columns + column[None, :]
    mass = tl.load(student + mass_at, mask=told, other=1.0) * inverse_s
    other = tl.maximum(tl.load(teacher + mass_at, mask=told, other=0.0) * inverse_t, FLOOR) * kept_t
    by_cell = tl.load(of_cell + column)[None, :]
    by_tokens = tl.load(of_tokens + column)[None, :]
    own = tl.where(c[:, None] == tl.load(realised + column)[None, :], by_cell, 0.0)
    by = tl.load(factor).to(tl.float32)
    within = by * tl.where(told & (mass > FLOOR), kept_s + (own - other) / tl.maximum(mass, FLOOR), 0.0)
    here = place[:, None] == tl.load(following + column)[None, :]
    result = p * (within - tl.load(everywhere + column)[None, :]) + tl.where(here, by_tokens, 0.0)
    tl.store(logits + at, result.to(logits.dtype.element_ty), mask=inside)


def takes(student: StudentBatch, teacher: TeacherBatch, spec: LossSpec) -> bool:
    """Whether these kernels know the form of both sides' logits, and the options."""
    return (
        spec.temperature == 1.0
        and not spec.reverse_kl
        and _plain(student.logits)
        and (_plain(teacher.logits) or isinstance(teacher.logits, CellScores))
    )


def _plain(form: Logits) -> bool:
    return isinstance(form, HiddenLogits) and form.bias is None and form.scale == 1.0 and form.softcap is None


@dataclass(frozen=True)
class Wanted:
    """What `run` is to make: gradients of kd · partition_kl, and with `ce` of ce · cross-entropy too."""

    gradients: bool
    kd: Tensor
    """0-dim."""
    ce: Tensor | None = None
    """0-dim; None: no cross-entropy, and its sums are zero."""


def run(student: StudentBatch, teacher: TeacherBatch, spec: LossSpec, wanted: Wanted) -> tuple[Tensor, list[Tensor | None]]:
    """Of what `takes`: [3] float64 sums (partition_kl, cross-entropy, tokens that are the argmax), and the gradients by the student's tensors."""
    form = student.logits
    assert isinstance(form, HiddenLogits) and teacher.projection is not None
    chunks = compared_chunks(student, teacher, spec)
    own = CellVocabulary(form, teacher.projection, "student", student.input_ids)
    other = _teacher_side(teacher)
    counted = None if wanted.ce is None else next_token_mask(student.token_mask, student.sample_mask).flatten()
    tiles = _tiles(chunks, counted)
    gradients = HiddenGradients(own.source, form, len(tiles) == 1) if wanted.gradients else None
    if gradients is not None:
        gradients.hidden.zero_()
    sums = torch.zeros(3, dtype=torch.float64, device=form.device)
    for tile in tiles:
        own_rows, own_chunk = _padded(tile.student_rows, tile.student_chunk, tile)
        own_side = own.side(own_rows, own_chunk)
        other_side = other(*_padded(tile.teacher_rows, tile.teacher_chunk, tile), own_side)
        part, rows = slice(tile.low, tile.high), tile.student_rows
        counts = None if counted is None else torch.nn.functional.pad(counted[rows], (0, tile.columns - len(rows)))
        sums += _compare(own_side, other_side, chunks.cell[part], chunks.realised[part], counts, wanted)
        if gradients is not None:
            gradients.add_rows(own_side.logits.T, own_rows, len(rows))
    return sums, [] if gradients is None else list(gradients.finished())


def _teacher_side(teacher: TeacherBatch) -> Callable[[Tensor, Tensor, CellSide], CellSide | ScoredSide]:
    """From the rows and chunks of a tile's columns, and the student's side, to the teacher's."""
    form = teacher.logits
    if isinstance(form, CellScores):
        return functools.partial(ScoredSide.of, form)
    assert isinstance(form, HiddenLogits) and teacher.projection is not None and teacher.input_ids is not None
    vocabulary = CellVocabulary(form, teacher.projection, "teacher", teacher.input_ids)
    return lambda rows, chunk, _: vocabulary.side(rows, chunk)


def sum_and_gradients(
    student: StudentBatch, teacher: TeacherBatch, spec: LossSpec, wanted: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """As `partition_tiles.sum_and_gradients`, of what `takes`."""
    sums, gradients = run(student, teacher, spec, Wanted(wanted, torch.ones((), device=student.logits.device)))
    return sums[0].float(), gradients


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: StudentBatch, teacher: TeacherBatch, spec: LossSpec, wanted: Wanted, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        found, ctx.gradients = run(student, teacher, spec, wanted)
        total = wanted.kd * found[0]
        ctx.mark_non_differentiable(found)
        ctx.set_materialize_grads(False)
        return found, (total if wanted.ce is None else total + wanted.ce * found[1]).float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("partition_kl: a second backward is not supported")
        return None, None, None, None, *(scaled(x, upstream[1]) for x in gradients)


def weighted_sums(
    student: StudentBatch, teacher: TeacherBatch, spec: LossSpec, kd: Tensor, ce: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sums of `run`, and kd · partition_kl + ce · cross-entropy, 0-dim float32, which alone is differentiable, once."""
    tensors = student.logits.tensors
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _Sums.apply(student, teacher, spec, Wanted(gradients, kd, ce), *tensors)


@dataclass(frozen=True)
class _Tile:
    """The chunks low..high-1 of a batch: which rows its columns are, and the realised chunk of each, from 0."""

    low: int
    high: int
    student_rows: Tensor
    student_chunk: Tensor
    teacher_rows: Tensor
    teacher_chunk: Tensor

    @property
    def columns(self) -> int:
        """Of both sides: the longer one's, and so many more that programs are full."""
        return COLUMNS * max(1, ceil_div(max(len(self.student_rows), len(self.teacher_rows)), COLUMNS))


def _tiles(chunks: ComparedChunks, counted: Tensor | None) -> list[_Tile]:
    """So many chunks at a time that a tile has some TILE_CHUNKS columns; the student's other rows that count lie in equal parts beside them."""
    count = len(chunks.cell)
    sides = []
    for first, chunk in ((chunks.student_row, chunks.student_chunk), (chunks.teacher_row, chunks.teacher_chunk)):
        others = (chunk.index_fill(0, first, count) < count).nonzero()[:, 0]  # of realised chunks, behind the first tokens
        sides.append((first, chunk, others[chunk[others].argsort(stable=True)]))
    rest = chunks.student_row[:0]
    if counted is not None:
        rest = (counted & (chunks.student_chunk == count)).index_fill(0, chunks.student_row, False).nonzero()[:, 0]
    ends = [[0, count], *([0, len(others)] for _, _, others in sides)]
    if count > TILE_CHUNKS:
        bounds = torch.arange(0, count + TILE_CHUNKS, TILE_CHUNKS, device=chunks.cell.device).clamp(max=count)
        ends = torch.stack([bounds, *(torch.searchsorted(chunk[others], bounds) for _, chunk, others in sides)]).tolist()
    spread = rest.tensor_split(max(1, len(ends[0]) - 1, ceil_div(len(rest), TILE_CHUNKS)))
    ends = [row + row[-1:] * (len(spread) + 1 - len(row)) for row in ends]  # tiles without chunks, if there are more other rows
    tiles = []
    for (low, *starts), (high, *stops), beside in zip(zip(*ends), list(zip(*ends))[1:], spread):
        columns: list[Tensor] = []
        for (first, chunk, others), start, stop in zip(sides, starts, stops):
            own = first.new_empty(0) if columns else beside
            rows = torch.cat([first[low:high], others[start:stop], own])
            columns += [rows, torch.where(chunk[rows] < count, chunk[rows] - low, high - low)]
        tiles.append(_Tile(low, high, *columns))
    return tiles


def _padded(rows: Tensor, chunk: Tensor, tile: _Tile) -> tuple[Tensor, Tensor]:
    """Rows and chunks of as many columns as both sides have: those at the end are row 0 and in no chunk."""
    more = tile.columns - len(rows)
    return torch.nn.functional.pad(rows, (0, more)), torch.nn.functional.pad(chunk, (0, more), value=tile.high - tile.low)


def _compare(
    own: CellSide, other: CellSide | ScoredSide, cell: Tensor, realised: Tensor, counted: Tensor | None, wanted: Wanted
) -> Tensor:
    """A tile's sums, as of `run`; its gradient takes the place of the student's logits. counted: [columns] bool, for the cross-entropy."""
    count, columns, log_probs = len(cell), own.logits.shape[1], own.log_probs()
    scales = torch.cat([own.scales(), other.scales()])
    splits = ceil_div(ceil_div(own.cells, SPLITS), BLOCK) * BLOCK
    parts, floored = torch.empty(2, SPLITS, columns, dtype=torch.float32, device=cell.device)
    launch(
        _kl_kernel, (columns // COLUMNS, SPLITS), own.mass, other.mass, scales, parts, floored, own.cells, columns, splits,
        FLOOR=FLOOR, BLOCK=BLOCK, COLUMNS=COLUMNS,
    )  # fmt: skip
    second, by_tokens, by_cell = _realised(own, other, log_probs, cell, realised, scales)
    sums = [parts[:, :count].sum() + second, second.new_zeros(()), second.new_zeros(())]
    everywhere = by_tokens + floored.sum(0)
    everywhere[:count] += by_cell
    everywhere[count:] = by_tokens[count:]
    by_tokens, everywhere = wanted.kd.float() * by_tokens, wanted.kd.float() * everywhere
    if counted is not None and wanted.ce is not None:
        sums[1:] = -torch.where(counted, log_probs, 0).sum(), (counted & (own.argmax == own.following)).sum()
        of_ce = wanted.ce.float() * counted
        by_tokens, everywhere = by_tokens - of_ce, everywhere - of_ce
    if wanted.gradients:
        by_cell, realised_cell = (torch.nn.functional.pad(x, (0, columns - count)) for x in (by_cell, cell.to(torch.int32)))
        launch(
            _gradient_kernel, (ceil_div(own.logits.shape[0], BLOCK), columns // COLUMNS), own.logits, own.maxima, own.mass, other.mass,
            own.cell, scales, realised_cell, by_cell, by_tokens, everywhere, own.following, wanted.kd, own.logits.shape[0], own.cells,
            columns, count, FLOOR=FLOOR, BLOCK=BLOCK, COLUMNS=COLUMNS,
        )  # fmt: skip
    return torch.stack([x.double() for x in sums])


def _realised(
    own: CellSide, other: CellSide | ScoredSide, log_probs: Tensor, cell: Tensor, realised: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The realised part of a tile, and its derivatives by the log probabilities of tokens and by the log masses of `cell`."""
    count = len(cell)
    inverse_s, _, inverse_t, kept_t = scales[:, :count]
    at = torch.arange(count, device=cell.device)
    with torch.enable_grad():
        tokens = log_probs.detach().requires_grad_()
        of_cell = (own.mass[cell, at] * inverse_s).clamp(min=FLOOR).log().requires_grad_()
        their_cell = (other.mass[cell, at] * inverse_t).clamp(min=FLOOR).log()
        share = chunk_sums(tokens, own.chunk, count) - of_cell
        their_share = chunk_sums(other.log_probs(), other.chunk, count) - their_cell
        value = realised_part(share, their_share, their_cell + kept_t.log(), realised, reverse=False)
        by_tokens, by_cell = torch.autograd.grad(value, (tokens, of_cell))
    return value.detach(), by_tokens, by_cell
