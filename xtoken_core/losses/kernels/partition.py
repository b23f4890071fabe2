"""partition_kl from hidden states, at τ = 1 and not reversed: masses of cells, their KL, and the gradient by the logits, each in one pass.

As in `partition_tiles`, a tile's logits are [V, columns] with the vocabulary in the order of cells; a column is a row of the batch. Its first
columns are the rows that predict the chunks' first tokens, in the order of the chunks on both sides; then come the rows that predict further
tokens of realised chunks. No probabilities are stored: exp(z - m) is formed anew wherever it is needed, m the largest logit of the column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.logits import HiddenLogits
from xtoken_core.losses.partition import CellOrder, ComparedChunks, cell_order, chunk_sums, realised_part
from xtoken_core.losses.selection import FLOOR, next_token_ids
from xtoken_core.losses.types import StudentBatch, TeacherBatch
from xtoken_core.projection import Projection
from xtoken_core.spec import LossSpec

COLUMNS = 64
"""Columns of a program; a tile has a multiple of it."""
SEGMENT = 64
"""Most tokens that one program adds up for a cell; larger cells are several segments."""
TILE_CHUNKS = 2048
"""Chunks of a tile."""
_SPLITS = 16
"""Parts into which the cells of a column are split for the KL."""
_BLOCK = 32


@dataclass(frozen=True)
class Segments:
    """The cells of a vocabulary, and as one more the tokens that are in none, in pieces of at most SEGMENT tokens, long ones first."""

    start: Tensor
    """[S] int32: the place of the first token."""
    size: Tensor
    """[S] int32."""
    row: Tensor
    """[S] int32: where the sum goes: the cell itself, or for its further pieces a row behind all cells, those of one cell together."""
    rows: int
    divided: Tensor
    """int64: the cells of several pieces."""
    further: Tensor
    """int64: how many further pieces each of them has."""
    cell: Tensor
    """[V] int32: the cell at each place; behind the last cell for a token without one."""


def segments(projection: Projection, side: str, vocab: int) -> Segments:
    """Of the first `vocab` ids of the `student` or the `teacher`."""
    order = projection.table(cell_order, side, vocab)
    device = order.sizes.device
    sizes = torch.cat([order.sizes, order.sizes.new_tensor([vocab - len(order.cell)])]).cpu()
    pieces = (sizes + SEGMENT - 1).div(SEGMENT, rounding_mode="floor").clamp(min=1)
    of = torch.repeat_interleave(torch.arange(len(sizes)), pieces)
    piece = torch.arange(len(of)) - (pieces.cumsum(0) - pieces)[of]
    start = (sizes.cumsum(0) - sizes)[of] + SEGMENT * piece
    size = (sizes[of] - SEGMENT * piece).clamp(max=SEGMENT)
    behind = len(sizes) + (piece > 0).cumsum(0) - 1
    row = torch.where(piece == 0, of, behind)
    longest = size.argsort(descending=True, stable=True)
    start, size, row = (x[longest].to(device, torch.int32) for x in (start, size, row))
    divided = (pieces > 1).nonzero()[:, 0]
    none = order.cell.new_full((vocab - len(order.cell),), len(order.sizes))
    cell = torch.cat([order.cell, none]).to(torch.int32)
    return Segments(start, size, row, len(of), divided.to(device), (pieces[divided] - 1).to(device), cell)


@triton.jit
def _mass_kernel(logits, maxima, start, size, row, mass, count, columns, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """mass[row, column] = Σ exp(z - m) over a segment's tokens."""
    segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = segment < count
    first = tl.load(start + segment, mask=inside, other=0).to(tl.int64)
    length = tl.load(size + segment, mask=inside, other=0)
    highest = tl.load(maxima + column)[None, :]
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for k in range(tl.max(length, 0)):
        at = (first + k)[:, None] * columns + column[None, :]
        z = tl.load(logits + at, mask=(k < length)[:, None], other=float("-inf")).to(tl.float32)
        total += tl.exp(z - highest)
    to = tl.load(row + segment, mask=inside, other=0).to(tl.int64)
    tl.store(mass + to[:, None] * columns + column[None, :], total, mask=inside[:, None])


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


@dataclass(frozen=True)
class _Side:
    """One side of a tile."""

    logits: Tensor
    """[V, columns]."""
    maxima: Tensor
    """[columns] float32."""
    mass: Tensor
    """[rows, columns] float32: of the cells, then of the tokens in none; what is behind is of no more use."""
    cells: int
    place_cell: Tensor
    """[V] int32: the cell at each place; one past the last for a token in none."""
    following: Tensor
    """[columns] int32: the place of the token that each column predicts."""
    chunk: Tensor
    """[columns] int64: its realised chunk within the tile; one past the last: none."""

    @property
    def kept(self) -> Tensor:
        """[columns]: N, the mass of all cells."""
        return self.mass[: self.cells].sum(0)

    def scales(self) -> Tensor:
        """[2, columns]: 1 / Z and Z / N."""
        kept = self.kept
        whole = kept + self.mass[self.cells]
        return torch.stack([1 / whole, whole / kept])

    def log_probs(self) -> Tensor:
        """[columns]: of the tokens at `following`."""
        z = self.logits.gather(0, self.following.long()[None])[0].float()
        return z - self.maxima - (self.kept + self.mass[self.cells]).log()


class _Vocabulary:
    """One side's hidden states and lm_head, its rows in the order of cells."""

    def __init__(self, form: HiddenLogits, projection: Projection, side: str, ids: Tensor):
        self.vocab = form.shape[2]
        self.order: CellOrder = projection.table(cell_order, side, self.vocab)
        self.segments = projection.table(segments, side, self.vocab)
        self.hidden = form.hidden.detach().flatten(0, 1)
        self.weight = form.weight.detach()[self.order.ids].to(form.hidden.dtype)
        self.following = self.order.place[next_token_ids(ids)].flatten()

    def side(self, rows: Tensor, chunk: Tensor) -> _Side:
        """Of the rows that a tile's columns are."""
        logits = self.weight @ self.hidden[rows].T
        maxima, parts = logits.amax(0).float(), self.segments
        mass = torch.empty(parts.rows, len(rows), dtype=torch.float32, device=rows.device)
        launch(
            _mass_kernel, (ceil_div(len(parts.start), _BLOCK), len(rows) // COLUMNS), logits, maxima, parts.start, parts.size, parts.row,
            mass, len(parts.start), len(rows), BLOCK=_BLOCK, COLUMNS=COLUMNS,
        )  # fmt: skip
        cells = len(self.order.sizes)
        if len(parts.divided):
            mass[parts.divided] += torch.segment_reduce(mass[cells + 1 :], "sum", lengths=parts.further, axis=0, unsafe=True)
        return _Side(logits, maxima, mass, cells, parts.cell, self.following[rows].to(torch.int32), chunk)


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
    own = _Vocabulary(form, teacher.projection, "student", student.input_ids)
    other = _Vocabulary(theirs, teacher.projection, "teacher", teacher.input_ids)
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
        others = (chunk.index_fill(0, first, count) < count).nonzero()[
            :, 0
        ]  # rows of realised chunks that predict no first token
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


def _compare(own: _Side, other: _Side, cell: Tensor, realised: Tensor, wanted: bool) -> Tensor:
    """A tile's sum; its gradient takes the place of the student's logits."""
    count, columns = len(cell), own.logits.shape[1]
    scales = torch.cat([own.scales(), other.scales()])
    splits = ceil_div(ceil_div(own.cells, _SPLITS), _BLOCK) * _BLOCK
    parts, floored = torch.empty(2, _SPLITS, columns, dtype=torch.float32, device=cell.device)
    launch(
        _kl_kernel, (columns // COLUMNS, _SPLITS), own.mass, other.mass, scales, parts, floored, own.cells, columns, splits,
        FLOOR=FLOOR, BLOCK=_BLOCK, COLUMNS=COLUMNS,
    )  # fmt: skip
    first = parts[:, :count].sum()
    inverse_s, _, inverse_t, kept_t = scales[:, :count]
    shares, at = [], torch.arange(count, device=cell.device)
    with torch.enable_grad():
        tokens = own.log_probs().requires_grad_()
        of_cell = (own.mass[cell, at] * inverse_s).clamp(min=FLOOR).log().requires_grad_()
        their_cell = (other.mass[cell, at] * inverse_t).clamp(min=FLOOR).log()
        for side, probs, of in ((own, tokens, of_cell), (other, other.log_probs(), their_cell)):
            shares.append(chunk_sums(probs, side.chunk, count) - of)
        second = realised_part(*shares, their_cell + kept_t.log(), realised, reverse=False)
        by_tokens, by_cell = torch.autograd.grad(second, (tokens, of_cell))
    if wanted:
        everywhere = by_tokens + floored.sum(0)
        everywhere[:count] += by_cell
        everywhere[count:] = by_tokens[count:]
        by_cell, realised_cell = (torch.nn.functional.pad(x, (0, columns - count)) for x in (by_cell, cell.to(torch.int32)))
        launch(
            _gradient_kernel, (ceil_div(own.logits.shape[0], _BLOCK), columns // COLUMNS), own.logits, own.maxima, own.mass, other.mass,
            own.place_cell, scales, realised_cell, by_cell, by_tokens, everywhere, own.following, own.logits.shape[0], own.cells, columns, count,
            FLOOR=FLOOR, BLOCK=_BLOCK, COLUMNS=COLUMNS,
        )  # fmt: skip
    return first + second.detach()
