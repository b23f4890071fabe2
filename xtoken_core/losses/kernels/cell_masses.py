"""The masses of a vocabulary's cells in rows of logits: for partition_kl.

A tile's logits are [V, columns]; a column is a row of the batch, so that the logits of one token lie together, and those of a cell's tokens
are read as whole lines wherever they are. Most cells hold one token, whose logit is read where a mass is wanted; the others have a table.
Logs are to the base 2, which is what a GPU computes: of an exponential to another base it makes four operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.kernels.sources import Source
from xtoken_core.losses.logits import HiddenLogits
from xtoken_core.losses.partition import cell_order
from xtoken_core.losses.selection import FLOOR
from xtoken_core.projection import Projection

COLUMNS = 64
"""Columns of a program; a tile has a multiple of it, since products of other sizes are several times slower."""
BLOCK = 32
"""Cells or tokens of a program."""
FEW = 16
"""Most tokens of a cell that are added up one after the other; a cell of more has programs of its own."""
SPLITS = 64
"""Parts into which the tokens or cells of a column are split, where each is gone through from first to last."""
LEAST = math.log2(FLOOR)
"""The log of a mass is at least this."""
LOG2_E = tl.constexpr(math.log2(math.e))


def largest_rest(cells: int) -> float:
    """What `Masses.rest` is at most: its value where the masses of all `cells` are at the floor."""
    return -LEAST - math.log2(max(cells, 1))


def whole_programs(rows: int) -> int:
    """The columns of a tile of so many rows."""
    return COLUMNS * max(1, ceil_div(rows, COLUMNS))


@dataclass(frozen=True)
class CellLists:
    """The cells of a vocabulary."""

    ids: Tensor
    """[V] int32: the tokens in the order of their cells."""
    cell: Tensor
    """[V] int32: the cell of each token; one past the last for a token without one."""
    at: Tensor
    """[cells] int32: the only token of a cell; for other cells -1 - the row of the table."""
    several: Tensor
    """[rows] int64: the cells of the table, those of many tokens first."""
    start: Tensor
    """[rows] int32: where in `ids` the tokens of these cells begin."""
    size: Tensor
    """[rows] int32: how many they are."""
    large: int
    """How many of them have more than FEW."""


def cell_lists(projection: Projection, side: str, vocab: int) -> CellLists:
    """Of the first `vocab` ids of the `student` or the `teacher`."""
    order = projection.table(cell_order, side, vocab)
    ids, sizes, device = order.ids.cpu(), order.sizes.cpu(), order.sizes.device
    start = sizes.cumsum(0) - sizes
    several = (sizes != 1).nonzero()[:, 0]
    several = several[sizes[several].argsort(descending=True, stable=True)]
    at = ids[start.clamp(max=len(ids) - 1)].index_copy(0, several, -1 - torch.arange(len(several)))
    cell = torch.full_like(ids, len(sizes)).index_copy(0, ids[: len(order.cell)], order.cell.cpu())
    ids, cell, at, start, size = (x.to(device, torch.int32) for x in (ids, cell, at, start[several], sizes[several]))
    return CellLists(ids, cell, at, several.to(device), start, size, int((sizes > FEW).sum()))


@triton.jit
def _scan_kernel(logits, cell, parts, token, vocab, cells, columns, per_split, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """parts [3, splits, columns]: m, the largest logit among a split's tokens, Σ exp(z - m) over all of them and over those in cells.

    token [splits, columns]: the first that has m.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * per_split
    best = tl.full([BLOCK, COLUMNS], -1e38, tl.float32)
    of_best = tl.full([BLOCK, COLUMNS], 2147483647, tl.int32)
    every = tl.zeros([BLOCK, COLUMNS], tl.float32)
    kept = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for v in range(first, first + per_split, BLOCK):
        id = v + tl.arange(0, BLOCK)
        at = id.to(tl.int64)[:, None] * columns + column[None, :]
        z = tl.load(logits + at, mask=(id < vocab)[:, None], other=float("-inf")).to(tl.float32)
        has = (tl.load(cell + id, mask=id < vocab, other=cells) < cells).to(tl.float32)[:, None]
        higher = z > best
        smaller = tl.exp2(-tl.abs(z - best) * LOG2_E)
        every = tl.where(higher, every * smaller + 1.0, every + smaller)
        kept = tl.where(higher, kept * smaller + has, kept + smaller * has)
        best = tl.where(higher, z, best)
        of_best = tl.where(higher, id[:, None], of_best)
    highest = tl.max(best, 0)
    by = tl.exp2((best - highest[None, :]) * LOG2_E)
    out = tl.program_id(1) * columns + column
    size = tl.num_programs(1) * columns
    tl.store(parts + out, highest)
    tl.store(parts + size + out, tl.sum(every * by, 0))
    tl.store(parts + 2 * size + out, tl.sum(kept * by, 0))
    tl.store(token + out, tl.min(tl.where(best == highest[None, :], of_best, 2147483647), 0))


@triton.jit
def _column_kernel(
    parts, token, logits, rows, following, top, over, rest, argmax, tokens, columns, first, last, limit, SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """From what `_scan_kernel` leaves the statistics of each column; see `CellSide`."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, SPLITS)[:, None] * columns + column[None, :]
    size = SPLITS * columns
    of_split = tl.load(parts + at)
    highest = tl.max(of_split, 0)
    by = tl.exp2((of_split - highest[None, :]) * LOG2_E)
    every = tl.sum(tl.load(parts + size + at) * by, 0)
    kept = tl.sum(tl.load(parts + 2 * size + at) * by, 0)
    tl.store(top + column, highest)
    tl.store(over + column, tl.log2(every))
    outside = tl.log2(every / kept)
    tl.store(rest + column, tl.where(outside > limit, limit, outside))  # a NaN stays
    tl.store(argmax + column, tl.min(tl.where(of_split == highest[None, :], tl.load(token + at), 2147483647), 0))
    row = tl.load(rows + column)
    inside = (row >= first) & (row < last)
    next = tl.load(following + row, mask=inside, other=0).to(tl.int64)
    own = tl.load(logits + next * columns + column).to(tl.float32) - highest - tl.log(every)
    tl.store(tokens + row - first, own, mask=inside)


@triton.jit
def _mass_kernel(
    logits, top, over, ids, start, size, table, count, columns, LEAST: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """table[row, column]: the log of a cell's mass. One program: BLOCK cells."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(start + row, mask=row < count, other=0)
    length = tl.load(size + row, mask=row < count, other=0)
    highest, whole = tl.load(top + column)[None, :], tl.load(over + column)[None, :]
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for k in range(tl.max(length, 0)):
        id = tl.load(ids + first + k, mask=k < length, other=0).to(tl.int64)
        at = id[:, None] * columns + column[None, :]
        z = tl.load(logits + at, mask=(k < length)[:, None], other=float("-inf")).to(tl.float32)
        total += tl.exp2((z - highest) * LOG2_E - whole)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(table + at, tl.maximum(tl.log2(total), LEAST), mask=(row < count)[:, None])


@triton.jit
def _large_mass_kernel(
    logits, top, over, ids, start, size, table, columns, LEAST: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """As `_mass_kernel`. One program: one cell."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1)
    first, length = tl.load(start + row), tl.load(size + row)
    highest, whole = tl.load(top + column)[None, :], tl.load(over + column)[None, :]
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for k0 in range(0, length, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        id = tl.load(ids + first + k, mask=k < length, other=0).to(tl.int64)
        at = id[:, None] * columns + column[None, :]
        z = tl.load(logits + at, mask=(k < length)[:, None], other=float("-inf")).to(tl.float32)
        total += tl.exp2((z - highest) * LOG2_E - whole)
    tl.store(table + row.to(tl.int64) * columns + column, tl.maximum(tl.log2(tl.sum(total, 0)), LEAST))


class Masses(NamedTuple):
    """The masses of a tile's cells as kernels take them: see `log_masses`. Logs are to the base 2."""

    logits: Tensor
    """[V, columns]."""
    table: Tensor
    """[rows, columns] float32: logs of the masses of cells that have a row."""
    at: Tensor
    """[cells] int32: the token that is the cell, or -1 - its row of the table."""
    top: Tensor
    """[columns] float32: m, the largest logit."""
    over: Tensor
    """[columns] float32: log Σ exp(z - m); together they would be less exact where a mass is near 1."""
    rest: Tensor
    """[columns] float32: log (Z / N), N the mass of all cells; at most `largest_rest`."""
    columns: int


@triton.jit
def log_masses(side, at, column, top, over, use, LEAST: tl.constexpr):
    """Logs of the masses, at least LEAST, of cells whose entries of `side.at` are `at`; finite where not `use`. top, over: the columns'."""
    single = at >= 0
    place = tl.where(single, at, -1 - at).to(tl.int64) * side.columns + column
    z = tl.load(side.logits + place, mask=use & single, other=0.0).to(tl.float32)
    stored = tl.load(side.table + place, mask=use & (single == 0), other=LEAST)
    return tl.maximum(tl.where(single, (z - top) * LOG2_E - over, stored), LEAST)


@dataclass(frozen=True)
class CellSide:
    """One side of a tile: the rows first..last-1 of a batch."""

    masses: Masses
    lists: CellLists
    hidden: Tensor
    """[columns, D]: zero where a column is no row."""
    argmax: Tensor
    """[columns] int32: the first token of the largest logit."""
    tokens: Tensor
    """[last - first] float32: natural log-probability of the token that each row predicts."""

    def log_cells(self) -> Tensor:
        """[cells, columns]: natural logs of the masses of all cells, at least that of FLOOR."""
        single = self.masses.logits[self.lists.at.clamp(min=0)].float() - self.masses.top - self.masses.over * math.log(2)
        return single.index_copy_(0, self.lists.several, self.masses.table * math.log(2)).clamp_(min=math.log(FLOOR))


class CellVocabulary:
    """One side's hidden states and lm_head, and its vocabulary's cells."""

    def __init__(self, form: HiddenLogits, projection: Projection, side: str, following: Tensor):
        """`following`: [R] the token that each row predicts."""
        self.source = Source.of(form)
        self.lists = projection.table(cell_lists, side, self.source.vocab)
        self.following = following

    def side(self, first: int, last: int, rows: Tensor | None = None) -> CellSide:
        """Of the rows first..last-1, as they come or as `rows` [columns] int64 puts them, where what is none of them makes a column of zeros."""
        assert self.source.weight is not None and self.source.hidden is not None
        device = self.source.hidden.device
        if rows is None:
            columns = whole_programs(last - first)
            hidden, rows = self.source.hidden[first:last], torch.arange(first, first + columns, device=device)
            hidden = hidden if columns == last - first else torch.nn.functional.pad(hidden, (0, 0, 0, columns - (last - first)))
        else:
            inside = ((rows >= first) & (rows < last))[:, None]
            columns, hidden = len(rows), torch.where(inside, self.source.hidden[rows.clamp(max=self.source.rows - 1)], 0)
        logits, lists = self.source.weight @ hidden.T, self.lists
        top, over, rest, tokens = torch.empty(4, columns, device=device)
        token = torch.empty(SPLITS + 1, columns, dtype=torch.int32, device=device)
        parts = torch.empty(3, SPLITS, columns, device=device)
        blocks, vocab, cells = columns // COLUMNS, len(logits), len(lists.at)
        per_split = ceil_div(ceil_div(vocab, SPLITS), BLOCK) * BLOCK
        launch(
            _scan_kernel, (blocks, SPLITS), logits, lists.cell, parts, token, vocab, cells, columns, per_split, BLOCK=BLOCK, COLUMNS=COLUMNS,
            num_warps=8,
        )  # fmt: skip
        launch(
            _column_kernel, (blocks,), parts, token, logits, rows, self.following, top, over, rest, token[SPLITS], tokens, columns, first, last,
            largest_rest(cells), SPLITS=SPLITS, COLUMNS=COLUMNS,
        )  # fmt: skip
        masses = Masses(logits, self._table(logits, top, over), lists.at, top, over, rest, columns)
        return CellSide(masses, lists, hidden, token[SPLITS], tokens[: last - first])

    def _table(self, logits: Tensor, top: Tensor, over: Tensor) -> Tensor:
        lists, columns = self.lists, logits.shape[1]
        rows, large, blocks = len(lists.several), lists.large, columns // COLUMNS
        table = torch.empty(rows, columns, device=logits.device)
        if large:
            launch(
                _large_mass_kernel, (blocks, large), logits, top, over, lists.ids, lists.start, lists.size, table, columns,
                LEAST=LEAST, BLOCK=4 * BLOCK, COLUMNS=COLUMNS,
            )  # fmt: skip
        if rows > large:
            start, size = lists.start[large:], lists.size[large:]
            launch(
                _mass_kernel, (blocks, ceil_div(rows - large, BLOCK)), logits, top, over, lists.ids, start, size, table[large:], rows - large,
                columns, LEAST=LEAST, BLOCK=BLOCK, COLUMNS=COLUMNS,
            )  # fmt: skip
        return table
