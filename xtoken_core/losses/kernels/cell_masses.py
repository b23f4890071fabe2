"""The masses of a vocabulary's cells in rows of logits: for partition_kl.

A tile's logits are [V, columns]; a column is a row of the batch, so that the logits of one token lie together, and those of a cell's tokens
are read as whole lines wherever they are. No probabilities are stored: exp(z - m) is formed anew wherever it is needed, m the largest
logit of the column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.kernels.sources import Source
from xtoken_core.losses.logits import HiddenLogits
from xtoken_core.losses.partition import cell_order
from xtoken_core.losses.selection import next_token_ids
from xtoken_core.projection import Projection

COLUMNS = 64
"""Columns of a program; a tile has a multiple of it."""
SEGMENT = 64
"""Most tokens that one program adds up for a cell; larger cells are several segments."""
BLOCK = 32
"""Segments, cells or tokens of a program."""
SPLITS = 64
"""Parts into which the tokens or cells of a column are split, where each is gone through from first to last."""


@dataclass(frozen=True)
class Segments:
    """The cells of a vocabulary, and as one more the tokens that are in none, in pieces of at most SEGMENT tokens, long ones first."""

    ids: Tensor
    """[V] int32: the tokens in the order of their cells."""
    start: Tensor
    """[S] int32: where in `ids` its tokens begin."""
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
    """[V] int32: the cell of each token; behind the last cell for a token without one."""
    cells: int


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
    cell = torch.cat([order.cell, none])[order.place].to(torch.int32)
    further = (pieces[divided] - 1).to(device)
    return Segments(order.ids.to(torch.int32), start, size, row, len(of), divided.to(device), further, cell, len(order.sizes))


@triton.jit
def _maxima_kernel(logits, top, token, vocab, columns, per_split, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """top, token [split, column]: the largest logit among a split's tokens, and the first token that has it."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * per_split
    best = tl.full([BLOCK, COLUMNS], float("-inf"), tl.float32)
    of_best = tl.full([BLOCK, COLUMNS], 2147483647, tl.int32)
    for v in range(first, first + per_split, BLOCK):
        id = v + tl.arange(0, BLOCK)
        at = id.to(tl.int64)[:, None] * columns + column[None, :]
        z = tl.load(logits + at, mask=(id < vocab)[:, None], other=float("-inf")).to(tl.float32)
        higher = z > best
        best = tl.where(higher, z, best)
        of_best = tl.where(higher, id[:, None], of_best)
    highest = tl.max(best, 0)
    tl.store(top + tl.program_id(1) * columns + column, highest)
    winner = tl.min(tl.where(best == highest[None, :], of_best, 2147483647), 0)
    tl.store(token + tl.program_id(1) * columns + column, winner)


def _maxima(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column the largest logit, float32, and the first token that has it, int32."""
    vocab, columns = logits.shape
    top = torch.empty(SPLITS, columns, dtype=torch.float32, device=logits.device)
    token = torch.empty(SPLITS, columns, dtype=torch.int32, device=logits.device)
    per_split = ceil_div(ceil_div(vocab, SPLITS), BLOCK) * BLOCK
    launch(
        _maxima_kernel, (columns // COLUMNS, SPLITS), logits, top, token, vocab, columns, per_split, BLOCK=BLOCK, COLUMNS=COLUMNS
    )
    highest = top.amax(0)
    return highest, torch.where(top == highest, token, vocab).amin(0)


@triton.jit
def _mass_kernel(logits, maxima, ids, start, size, row, mass, count, columns, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """mass[row, column] = Σ exp(z - m) over a segment's tokens."""
    segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = segment < count
    first = tl.load(start + segment, mask=inside, other=0)
    length = tl.load(size + segment, mask=inside, other=0)
    highest = tl.load(maxima + column)[None, :]
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for k in range(tl.max(length, 0)):
        id = tl.load(ids + first + k, mask=k < length, other=0).to(tl.int64)
        at = id[:, None] * columns + column[None, :]
        z = tl.load(logits + at, mask=(k < length)[:, None], other=float("-inf")).to(tl.float32)
        total += tl.exp(z - highest)
    to = tl.load(row + segment, mask=inside, other=0).to(tl.int64)
    tl.store(mass + to[:, None] * columns + column[None, :], total, mask=inside[:, None])


@dataclass(frozen=True)
class CellSide:
    """One side of a tile."""

    logits: Tensor
    """[V, columns]."""
    maxima: Tensor
    """[columns] float32."""
    argmax: Tensor
    """[columns] int32."""
    mass: Tensor
    """[rows, columns] float32: of the cells, then of the tokens in none; what is behind is of no more use."""
    kept: Tensor
    """[columns]: N, the mass of all cells."""
    cell: Tensor
    """[V] int32: see `Segments`."""
    following: Tensor
    """[columns] int32: the token that each column predicts."""
    chunk: Tensor
    """[columns] int64: its realised chunk within the tile; one past the last: none."""
    cells: int

    def scales(self) -> Tensor:
        """[2, columns]: 1 / Z and Z / N."""
        whole = self.kept + self.mass[self.cells]
        return torch.stack([1 / whole, whole / self.kept])

    def log_probs(self) -> Tensor:
        """[columns]: of the tokens at `following`."""
        z = self.logits.gather(0, self.following.long()[None])[0].float()
        return z - self.maxima - (self.kept + self.mass[self.cells]).log()


class CellVocabulary:
    """One side's hidden states and lm_head, and its vocabulary's cells."""

    def __init__(self, form: HiddenLogits, projection: Projection, side: str, ids: Tensor):
        self.source = Source.of(form)
        self.segments = projection.table(segments, side, self.source.vocab)
        self.following = next_token_ids(ids).flatten().to(torch.int32)

    def side(self, rows: Tensor, chunk: Tensor) -> CellSide:
        """Of the rows that a tile's columns are."""
        assert self.source.weight is not None and self.source.hidden is not None
        logits, parts = self.source.weight @ self.source.hidden[rows].T, self.segments
        maxima, argmax = _maxima(logits)
        mass = torch.empty(parts.rows, len(rows), dtype=torch.float32, device=rows.device)
        launch(
            _mass_kernel, (ceil_div(len(parts.start), BLOCK), len(rows) // COLUMNS), logits, maxima, parts.ids, parts.start, parts.size,
            parts.row, mass, len(parts.start), len(rows), BLOCK=BLOCK, COLUMNS=COLUMNS,
        )  # fmt: skip
        if len(parts.divided):
            more = torch.segment_reduce(mass[parts.cells + 1 :], "sum", lengths=parts.further, axis=0, unsafe=True)
            mass[parts.divided] += more
        kept = mass[: parts.cells].sum(0)
        return CellSide(logits, maxima, argmax, mass, kept, parts.cell, self.following[rows], chunk, parts.cells)
