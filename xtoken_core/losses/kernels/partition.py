"""partition_kl from hidden states, at τ = 1 and not reversed: masses of cells, their KL, and the gradient by the logits, each in one pass.

A tile's first columns are the rows that predict the chunks' first tokens, in the order of the chunks on both sides; then come the rows that
predict further tokens of realised chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.cell_masses import BLOCK, COLUMNS, CellSide, CellVocabulary
from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.logits import HiddenLogits
from xtoken_core.losses.partition import ComparedChunks, chunk_sums, realised_part
from xtoken_core.losses.selection import FLOOR
from xtoken_core.losses.types import StudentBatch, TeacherBatch
from xtoken_core.spec import LossSpec

TILE_CHUNKS = 2048
"""Chunks of a tile."""
_SPLITS = 16
"""Parts into which the cells of a column are split for the KL."""


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
    logits, maxima, student, teacher, cell, scales, realised, of_cell, of_tokens, everywhere, following, vocab, cells, columns, compared,
    FLOOR: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient by the logits, written over them; scales as in `_kl_kernel`, compared: the columns of first tokens.

    of_cell: the derivative by the log mass of the cell `realised`; of_tokens: by the log probability of the token at `following`;
    everywhere: the sum of the derivatives by all log masses and log probabilities that move.
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
    within = tl.where(told & (mass > FLOOR), kept_s + (own - other) / tl.maximum(mass, FLOOR), 0.0)
    here = place[:, None] == tl.load(following + column)[None, :]
    result = p * (within - tl.load(everywhere + column)[None, :]) + tl.where(here, by_tokens, 0.0)
    tl.store(logits + at, result.to(logits.dtype.element_ty), mask=inside)


def takes(student: StudentBatch, teacher: TeacherBatch, spec: LossSpec) -> bool:
    """Whether these kernels know the form of both sides' logits, and the options."""
    return (
        spec.temperature == 1.0
        and not spec.reverse_kl
        and all(
            isinstance(form, HiddenLogits) and form.bias is None and form.scale == 1.0 and form.softcap is None
            for form in (student.logits, teacher.logits)
        )
    )


def sum_and_gradients(
    student: StudentBatch, teacher: TeacherBatch, chunks: ComparedChunks, spec: LossSpec, wanted: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """As `partition_tiles.sum_and_gradients`, of what `takes`."""
    form, theirs = student.logits, teacher.logits
    assert isinstance(form, HiddenLogits) and isinstance(theirs, HiddenLogits)
    assert teacher.projection is not None and teacher.input_ids is not None
    own = CellVocabulary(form, teacher.projection, "student", student.input_ids)
    other = CellVocabulary(theirs, teacher.projection, "teacher", teacher.input_ids)
    total = torch.zeros((), device=form.device)
    of_hidden, of_weight = torch.zeros_like(own.hidden), torch.zeros_like(own.weight, dtype=torch.float32)
    for tile in _tiles(chunks):
        own_side = own.side(*_padded(tile.student_rows, tile.student_chunk, tile))
        other_side = other.side(*_padded(tile.teacher_rows, tile.teacher_chunk, tile))
        part = slice(tile.low, tile.high)
        total += _compare(own_side, other_side, chunks.cell[part], chunks.realised[part], wanted)
        if wanted:
            gradient, rows = own_side.logits[:, : len(tile.student_rows)], tile.student_rows
            of_weight += gradient @ own.hidden[rows]
            of_hidden[rows] = gradient.T @ own.weight
    return total, [of_hidden.view(form.hidden.shape), of_weight[own.order.place], None] if wanted else []


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
        return COLUMNS * ceil_div(max(len(self.student_rows), len(self.teacher_rows)), COLUMNS)


def _tiles(chunks: ComparedChunks) -> list[_Tile]:
    """So many chunks at a time that a tile has some TILE_CHUNKS columns."""
    count = len(chunks.cell)
    bounds = torch.arange(0, count + TILE_CHUNKS, TILE_CHUNKS, device=chunks.cell.device).clamp(max=count)
    sides = []
    for first, chunk in ((chunks.student_row, chunks.student_chunk), (chunks.teacher_row, chunks.teacher_chunk)):
        others = (chunk.index_fill(0, first, count) < count).nonzero()[:, 0]  # of realised chunks, behind the first tokens
        others = others[chunk[others].argsort(stable=True)]
        sides.append((first, chunk, others, torch.searchsorted(chunk[others], bounds)))
    ends = torch.stack([bounds, *(side[3] for side in sides)]).tolist()
    tiles = []
    for (low, *starts), (high, *stops) in zip(zip(*ends), list(zip(*ends))[1:]):
        columns: list[Tensor] = []
        for (first, chunk, others, _), start, stop in zip(sides, starts, stops):
            rows = torch.cat([first[low:high], others[start:stop]])
            columns += [rows, torch.where(chunk[rows] < count, chunk[rows] - low, high - low)]
        tiles.append(_Tile(low, high, *columns))
    return tiles


def _padded(rows: Tensor, chunk: Tensor, tile: _Tile) -> tuple[Tensor, Tensor]:
    """Rows and chunks of as many columns as both sides have: those at the end are row 0 and in no chunk."""
    more = tile.columns - len(rows)
    return torch.nn.functional.pad(rows, (0, more)), torch.nn.functional.pad(chunk, (0, more), value=tile.high - tile.low)


def _compare(own: CellSide, other: CellSide, cell: Tensor, realised: Tensor, wanted: bool) -> Tensor:
    """A tile's sum; its gradient takes the place of the student's logits."""
    count, columns = len(cell), own.logits.shape[1]
    scales = torch.cat([own.scales(), other.scales()])
    splits = ceil_div(ceil_div(own.cells, _SPLITS), BLOCK) * BLOCK
    parts, floored = torch.empty(2, _SPLITS, columns, dtype=torch.float32, device=cell.device)
    launch(
        _kl_kernel, (columns // COLUMNS, _SPLITS), own.mass, other.mass, scales, parts, floored, own.cells, columns, splits,
        FLOOR=FLOOR, BLOCK=BLOCK, COLUMNS=COLUMNS,
    )  # fmt: skip
    first = parts[:, :count].sum()
    second, by_tokens, by_cell = _realised(own, other, cell, realised, scales)
    if wanted:
        everywhere = by_tokens + floored.sum(0)
        everywhere[:count] += by_cell
        everywhere[count:] = by_tokens[count:]
        by_cell, realised_cell = (torch.nn.functional.pad(x, (0, columns - count)) for x in (by_cell, cell.to(torch.int32)))
        launch(
            _gradient_kernel, (ceil_div(own.logits.shape[0], BLOCK), columns // COLUMNS), own.logits, own.maxima, own.mass, other.mass,
            own.place_cell, scales, realised_cell, by_cell, by_tokens, everywhere, own.following, own.logits.shape[0], own.cells, columns, count,
            FLOOR=FLOOR, BLOCK=BLOCK, COLUMNS=COLUMNS,
        )  # fmt: skip
    return first + second


def _realised(own: CellSide, other: CellSide, cell: Tensor, realised: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The realised part of a tile, and its derivatives by the log probabilities of tokens and by the log masses of `cell`."""
    count = len(cell)
    inverse_s, _, inverse_t, kept_t = scales[:, :count]
    at = torch.arange(count, device=cell.device)
    with torch.enable_grad():
        tokens = own.log_probs().requires_grad_()
        of_cell = (own.mass[cell, at] * inverse_s).clamp(min=FLOOR).log().requires_grad_()
        their_cell = (other.mass[cell, at] * inverse_t).clamp(min=FLOOR).log()
        share = chunk_sums(tokens, own.chunk, count) - of_cell
        their_share = chunk_sums(other.log_probs(), other.chunk, count) - their_cell
        value = realised_part(share, their_share, their_cell + kept_t.log(), realised, reverse=False)
        by_tokens, by_cell = torch.autograd.grad(value, (tokens, of_cell))
    return value.detach(), by_tokens, by_cell
