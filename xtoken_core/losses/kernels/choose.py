"""The choice of K from column maxima, and K's order: the teacher columns that most student tokens map to come first.

The k-th largest maximum comes from `torch.topk`; columns above it are chosen, and of those equal to it the lowest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import launch
from xtoken_core.losses.kernels.touched import ByTeacher

_BLOCK = 1024

HEAVY = 16
"""A teacher column with more student tokens than this is summed by a tile of lanes, not by one."""

_CLASSES = tl.constexpr(4)
"""Columns are sorted by entries into classes of more than 256, 64, 16, 4 and the rest, so that neighbours take about as long."""


@triton.jit
def _tally_kernel(maxima, edge, tally, vocab, BLOCK: tl.constexpr):
    """Per block of columns: how many are above the edge, and how many level with it."""
    block, blocks, set_ = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(maxima + set_ * vocab + v, mask=v < vocab, other=float("nan"))
    limit = tl.load(edge + set_)
    tl.store(tally + set_ * 2 * blocks + block, tl.sum((x > limit).to(tl.int32), 0))
    tl.store(tally + (set_ * 2 + 1) * blocks + block, tl.sum((x == limit).to(tl.int32), 0))


@triton.jit
def _choose_kernel(maxima, edge, tally, columns, place, vocab, k, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Writes the chosen columns of a block to their places, which are the number of chosen columns before each."""
    block, blocks, set_ = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    b = tl.arange(0, BLOCKS)
    above = tl.load(tally + set_ * 2 * blocks + b, mask=b < blocks, other=0)
    level = tl.load(tally + (set_ * 2 + 1) * blocks + b, mask=b < blocks, other=0)
    room = k - tl.sum(above, 0)
    above_before = tl.sum(tl.where(b < block, above, 0), 0)
    level_before = tl.sum(tl.where(b < block, level, 0), 0)
    v = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(maxima + set_ * vocab + v, mask=v < vocab, other=float("nan"))
    limit = tl.load(edge + set_)
    is_level = (x == limit).to(tl.int32)
    chosen = (x > limit) | ((x == limit) & (level_before + tl.cumsum(is_level, 0) <= room))
    at = above_before + tl.minimum(level_before, room) + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(columns + set_ * k + at, v, mask=chosen)
    tl.store(place + set_ * vocab + v, tl.where(chosen, at, -1), mask=v < vocab)


def largest_columns(maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[sets, V] float32 maxima -> [sets, k] int32 columns, ascending, and [sets, V] int32: where a column stands, or -1.

    As `selection.largest_columns`. k <= V. Columns whose maximum is not a number are not chosen (where nothing else is left, column 0 fills up).
    """
    sets, vocab = maxima.shape
    if k >= vocab:
        columns = torch.arange(vocab, dtype=torch.int32, device=maxima.device).expand(sets, vocab).contiguous()
        return columns, columns
    edge = maxima.topk(k, sorted=False).values.amin(1)
    columns = torch.zeros(sets, k, dtype=torch.int32, device=maxima.device)
    place = torch.empty(sets, vocab, dtype=torch.int32, device=maxima.device)
    blocks = triton.cdiv(vocab, _BLOCK)
    tally = torch.empty(sets, 2, blocks, dtype=torch.int32, device=maxima.device)
    launch(_tally_kernel, (blocks, sets), maxima, edge, tally, vocab, BLOCK=_BLOCK)
    launch(
        _choose_kernel, (blocks, sets),
        maxima, edge, tally, columns, place, vocab, k, BLOCK=_BLOCK, BLOCKS=triton.next_power_of_2(blocks)
    )
    return columns, place


@dataclass(frozen=True)
class Columns:
    """K of each sequence (or one K for all), with W's entries in it; columns with the most student tokens first."""

    index: Tensor
    """[sets, k] int32 teacher columns."""
    start: Tensor
    """[sets, k] int32: first entry of each column in `ByTeacher`."""
    count: Tensor
    """[sets, k] int32: its entries."""
    heavy: Tensor
    """[sets] int32: how many columns, the first ones, have more than HEAVY."""
    place: Tensor
    """[sets, V_t] int32: where a teacher column stands in `index`, or -1."""


@triton.jit
def _class_of(n):
    """0 for the fullest columns, _CLASSES for the emptiest."""
    which = tl.full(n.shape, _CLASSES, tl.int32)
    for c in tl.static_range(_CLASSES):
        which -= (n > (4 << (2 * c))).to(tl.int32)
    return which


@triton.jit
def _order_kernel(columns, starts, index, start, count, heavy, place, vocab, k, HEAVY: tl.constexpr, BLOCK: tl.constexpr):
    """One program a set: the columns by class, and in each class in the order they had."""
    set_ = tl.program_id(0)
    before = tl.zeros([], tl.int32)
    many = tl.zeros([], tl.int32)
    for c in range(_CLASSES + 1):
        for j0 in range(0, k, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            column = tl.load(columns + set_ * k + j, mask=j < k, other=0)
            first = tl.load(starts + column, mask=j < k, other=0)
            n = tl.load(starts + column + 1, mask=j < k, other=0) - first
            mine = (j < k) & (_class_of(n) == c)
            at = before + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(index + set_ * k + at, column, mask=mine)
            tl.store(start + set_ * k + at, first, mask=mine)
            tl.store(count + set_ * k + at, n, mask=mine)
            tl.store(place + set_ * vocab + column, at, mask=mine)
            before += tl.sum(mine.to(tl.int32), 0)
            many += tl.sum((mine & (n > HEAVY)).to(tl.int32), 0)
    tl.store(heavy + set_, many)


def ordered_columns(columns: Tensor, place: Tensor, table: ByTeacher) -> Columns:
    """From `largest_columns`; `place` is changed to the new order (unless K is the whole vocabulary, where it is copied)."""
    (sets, k), vocab = columns.shape, place.shape[1]
    if place.data_ptr() == columns.data_ptr():
        place = place.clone()
    index, start, count = torch.empty(3, sets, k, dtype=torch.int32, device=columns.device).unbind()
    heavy = torch.empty(sets, dtype=torch.int32, device=columns.device)
    launch(
        _order_kernel, (sets,), columns, table.start, index, start, count, heavy, place, vocab, k, HEAVY=HEAVY, BLOCK=8192, num_warps=16
    )  # fmt: skip
    return Columns(index, start, count, heavy, place)
