"""The masses of a vocabulary's cells in rows of logits: for partition_kl.

A tile's logits are [V, columns] with the vocabulary in the order of cells; a column is a row of the batch. No probabilities are stored:
exp(z - m) is formed anew wherever it is needed, m the largest logit of the column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.logits import HiddenLogits
from xtoken_core.losses.partition import CellOrder, cell_order
from xtoken_core.losses.selection import next_token_ids
from xtoken_core.projection import Projection

COLUMNS = 64
"""Columns of a program; a tile has a multiple of it."""
SEGMENT = 64
"""Most tokens that one program adds up for a cell; larger cells are several segments."""
BLOCK = 32
"""Segments, cells or tokens of a program."""


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


@dataclass(frozen=True)
class CellSide:
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


class CellVocabulary:
    """One side's hidden states and lm_head, its rows in the order of cells."""

    def __init__(self, form: HiddenLogits, projection: Projection, side: str, ids: Tensor):
        self.vocab = form.shape[2]
        self.order: CellOrder = projection.table(cell_order, side, self.vocab)
        self.segments = projection.table(segments, side, self.vocab)
        self.hidden = form.hidden.detach().flatten(0, 1)
        self.weight = form.weight.detach()[self.order.ids].to(form.hidden.dtype)
        self.following = self.order.place[next_token_ids(ids)].flatten()

    def side(self, rows: Tensor, chunk: Tensor) -> CellSide:
        """Of the rows that a tile's columns are."""
        logits = self.weight @ self.hidden[rows].T
        maxima, parts = logits.amax(0).float(), self.segments
        mass = torch.empty(parts.rows, len(rows), dtype=torch.float32, device=rows.device)
        launch(
            _mass_kernel, (ceil_div(len(parts.start), BLOCK), len(rows) // COLUMNS), logits, maxima, parts.start, parts.size, parts.row,
            mass, len(parts.start), len(rows), BLOCK=BLOCK, COLUMNS=COLUMNS,
        )  # fmt: skip
        cells = len(self.order.sizes)
        if len(parts.divided):
            mass[parts.divided] += torch.segment_reduce(mass[cells + 1 :], "sum", lengths=parts.further, axis=0, unsafe=True)
        return CellSide(logits, maxima, mass, cells, parts.cell, self.following[rows].to(torch.int32), chunk)
