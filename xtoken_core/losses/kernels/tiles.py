"""Into which stretches of rows a batch is cut, so that no chunk of any teacher is cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xtoken_core.losses.kernels.rowsets import Rows

TILE_ROWS = 2048
"""Rows of a tile, unless a chunk is in the way."""

Range = tuple[int, int]


class Cuts:
    """Stretches of at most TILE_ROWS student rows where chunks allow it, and each teacher's rows of the chunks inside.

    Chunks may lie in any order; only where they interlace do tiles grow. Where there is more than one tile the host needs to know where chunks end:
    that is asked for at once, and waited for when `tiles` is called, with the device's work in between.
    """

    def __init__(self, rows: int, sides: Sequence[tuple[Rows, Rows]]):
        """`rows`: R student rows. `sides`: per cross-tokenizer teacher, its student rows and its teacher rows."""
        self.rows, self.whole = rows, [(0, teacher.chunk.shape[0]) for _, teacher in sides]
        self.table: Tensor | None = None
        if rows > TILE_ROWS and sides:
            table = torch.cat([_boundaries(rows, *pair) for pair in sides])
            self.table = torch.empty(table.shape, dtype=table.dtype, pin_memory=table.is_cuda).copy_(table, non_blocking=True)
            self.asked = torch.cuda.Event() if table.is_cuda else None
            if self.asked is not None:
                self.asked.record()

    def tiles(self) -> list[tuple[Range, list[Range]]]:
        """Student rows, and per teacher its rows, of each tile."""
        if self.table is None:
            bounds = [*range(0, self.rows, TILE_ROWS), self.rows]
            return [((a, b), self.whole) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        if self.asked is not None:
            self.asked.synchronize()
        table = self.table
        blocked = table[::3].amax(0) > 0
        allowed = [r for r in (~blocked).nonzero().squeeze(1).tolist() if r > 0]
        tiles, begin = [], 0
        for position, r in enumerate(allowed):
            if position + 1 == len(allowed) or allowed[position + 1] - begin > TILE_ROWS:
                ranges = [(int(table[3 * i + 1, begin]), int(table[3 * i + 2, r])) for i in range(len(self.whole))]
                tiles.append(((begin, r), [(low, high) if low < high else (0, 0) for low, high in ranges]))
                begin = r
        return tiles


def _boundaries(rows: int, student: Rows, teacher: Rows) -> Tensor:
    """[3, R + 1], at each row r: how many chunks a cut before r would cut; the first teacher row of chunks that begin at r or later;
    one past the last teacher row of chunks that end before r.
    """
    device = student.first.device
    valid = student.count > 0
    spare = rows + 1  # where chunks without rows go
    begin, end = (torch.where(valid, x.long() + 1, spare) for x in (student.first, student.last))
    one = torch.ones_like(begin)
    crossing = torch.zeros(rows + 2, dtype=torch.int64, device=device).scatter_add_(0, begin, one).scatter_add_(0, end, -one)
    low = torch.full((rows + 2,), teacher.chunk.shape[0], dtype=torch.int64, device=device)
    low.scatter_reduce_(0, torch.where(valid, begin - 1, spare), teacher.first.long(), "amin")
    high = torch.zeros(rows + 2, dtype=torch.int64, device=device).scatter_reduce_(0, end, teacher.last.long() + 1, "amax")
    low, high, crossing = low[:-1].flip(0).cummin(0).values.flip(0), high[:-1].cummax(0).values, crossing[:-1].cumsum(0)
    return torch.stack([crossing, low, high])
