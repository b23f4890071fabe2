"""Into which stretches of rows a batch is cut, so that no chunk of any teacher is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xtoken_core.losses.kernels.chunks import Rows

TILE_ROWS = 2048
"""Rows of a tile, unless a chunk is in the way."""

Range = tuple[int, int]
"""First row, and one past the last."""

Chunks = Sequence[tuple[Rows, Rows] | None]
"""Per teacher its student rows and its teacher rows; None for one with the student's vocabulary."""


class TileRows(NamedTuple):
    """The rows of one tile."""

    first: int
    last: int
    by_term: tuple[Range, ...]
    """Each teacher's rows: of the chunks inside; with the student's vocabulary, the tile's own."""


def whole_batch(rows: int, chunks: Chunks) -> list[TileRows]:
    """All of a batch of `rows` student rows as one tile."""
    return [_tile(0, rows, chunks, [(0, pair[1].chunk.shape[0]) for pair in chunks if pair is not None])]


def _tile(first: int, last: int, chunks: Chunks, ranges: Sequence[Range]) -> TileRows:
    """`ranges`: of the teachers across tokenizers."""
    given = iter(ranges)
    return TileRows(first, last, tuple((first, last) if pair is None else next(given) for pair in chunks))


class Cuts:
    """Stretches of at most TILE_ROWS student rows where chunks allow it, and each teacher's rows of the chunks inside.

    Chunks may lie in any order; only where they interlace do tiles grow. Where there is more than one tile the host needs to know where chunks end:
    that is asked for at once, and waited for when `tiles` is called, with the device's work in between.
    """

    def __init__(self, rows: int, chunks: Chunks):
        """`rows`: R student rows."""
        self.rows, self.chunks = rows, chunks
        self.table: Tensor | None = None
        pairs = [pair for pair in chunks if pair is not None]
        if rows > TILE_ROWS and pairs:
            table = torch.cat([_boundaries(rows, *pair) for pair in pairs])
            self.table = torch.empty(table.shape, dtype=table.dtype, pin_memory=table.is_cuda).copy_(table, non_blocking=True)
            self.asked = torch.cuda.Event() if table.is_cuda else None
            if self.asked is not None:
                self.asked.record()

    def tiles(self) -> list[TileRows]:
        """The tiles, in order."""
        if self.table is None:
            whole = [(0, pair[1].chunk.shape[0]) for pair in self.chunks if pair is not None]
            bounds = [*range(0, self.rows, TILE_ROWS), self.rows]
            return [_tile(a, b, self.chunks, whole) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        if self.asked is not None:
            self.asked.synchronize()
        table = self.table
        blocked = table[::3].amax(0) > 0
        allowed = [r for r in (~blocked).nonzero().squeeze(1).tolist() if r > 0]
        tiles, begin = [], 0
        for position, r in enumerate(allowed):
            if position + 1 == len(allowed) or allowed[position + 1] - begin > TILE_ROWS:
                ranges = [(int(low[begin]), int(high[r])) for low, high in zip(table[1::3], table[2::3], strict=True)]
                tiles.append(_tile(begin, r, self.chunks, [(a, b) if a < b else (0, 0) for a, b in ranges]))
                begin = r
        return tiles


def _boundaries(rows: int, student: Rows, teacher: Rows) -> Tensor:
    """[3, R + 1], at each row r: how many chunks a cut before r would cut; the first teacher row of chunks that begin at r or later;
    one past the last teacher row of chunks that end before r.
    """
    device = student.first.device
    valid = student.size > 0
    spare = rows + 1  # where chunks without rows go
    begin, end = (torch.where(valid, x.long() + 1, spare) for x in (student.first, student.last))
    one = torch.ones_like(begin)
    crossing = torch.zeros(rows + 2, dtype=torch.int64, device=device).scatter_add_(0, begin, one).scatter_add_(0, end, -one)
    low = torch.full((rows + 2,), teacher.chunk.shape[0], dtype=torch.int64, device=device)
    low.scatter_reduce_(0, torch.where(valid, begin - 1, spare), teacher.first.long(), "amin")
    high = torch.zeros(rows + 2, dtype=torch.int64, device=device).scatter_reduce_(0, end, teacher.last.long() + 1, "amax")
    low, high, crossing = low[:-1].flip(0).cummin(0).values.flip(0), high[:-1].cummax(0).values, crossing[:-1].cumsum(0)
    return torch.stack([crossing, low, high])
