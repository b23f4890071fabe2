"""The choice of K from column maxima, and K's order: the teacher columns that most student tokens map to come first.

The k-th largest maximum is found by radix selection, three digits of its bits; columns above it are chosen, and of those equal to it the lowest.
Counts are integers: atomics do not make them depend on order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.kernels.touched import ByTeacher

_BLOCK = 1024

HEAVY = 16
"""A teacher column with more student tokens than this is summed by a tile of lanes, not by one."""

_CLASSES = tl.constexpr(4)
"""Columns are sorted by entries into classes of more than 256, 64, 16, 4 and the rest, so that neighbours take about as long."""


@triton.jit
def _key(x):
    """float32 as an int32 of the same order; the two zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _digit(counts, k):
    """Of counts of 2048 digits: the digit of the k-th largest key, and its rank among the keys with that digit."""
    lane = tl.arange(0, 2048)
    n = tl.load(counts + lane)
    least = tl.sum(n, 0) - tl.cumsum(n, 0) + n  # keys with at least this digit
    digit = tl.max(tl.where(least >= k, lane, 0), 0)
    return digit, k - tl.sum(tl.where(lane > digit, n, 0), 0)


@triton.jit
def _count_kernel(partial, maxima, counts, vocab, k, PARTS: tl.constexpr, PASS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the keys of a block by their digit of this pass (11, 11 and 10 bits), where they agree with the k-th largest so far. The first pass
    also joins the partial maxima.
    """
    set_ = tl.program_id(1)
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = v < vocab
    mine = counts + set_ * 3 * 2048
    if PASS == 0:
        x = tl.load(partial + set_ * PARTS * vocab + v, mask=inside, other=float("-inf"))
        for part in range(1, PARTS):
            x = tl.maximum(x, tl.load(partial + (set_ * PARTS + part) * vocab + v, mask=inside, other=float("-inf")))
        tl.store(maxima + set_ * vocab + v, x, mask=inside)
        tl.atomic_add(mine + (_key(x) >> 21) + 1024, 1, mask=inside, sem="relaxed")
    else:
        key = _key(tl.load(maxima + set_ * vocab + v, mask=inside, other=0.0))
        first, rest = _digit(mine, k)
        match = inside & ((key >> 21) + 1024 == first)
        if PASS == 1:
            tl.atomic_add(mine + 2048 + ((key >> 10) & 2047), 1, mask=match, sem="relaxed")
        else:
            second, rest = _digit(mine + 2048, rest)
            match = match & (((key >> 10) & 2047) == second)
            tl.atomic_add(mine + 4096 + (key & 1023), 1, mask=match, sem="relaxed")


@triton.jit
def _tally_kernel(maxima, counts, edge, tally, vocab, k, BLOCK: tl.constexpr):
    """The key of the k-th largest, and per block of columns how many are above it and how many level with it."""
    block, blocks, set_ = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    mine = counts + set_ * 3 * 2048
    first, rest = _digit(mine, k)
    second, rest = _digit(mine + 2048, rest)
    third, rest = _digit(mine + 4096, rest)
    limit = (first - 1024) * 2097152 + second * 1024 + third
    v = block * BLOCK + tl.arange(0, BLOCK)
    key = _key(tl.load(maxima + set_ * vocab + v, mask=v < vocab, other=0.0))
    tl.store(edge + set_, limit)
    tl.store(tally + set_ * 2 * blocks + block, tl.sum(((v < vocab) & (key > limit)).to(tl.int32), 0))
    tl.store(tally + (set_ * 2 + 1) * blocks + block, tl.sum(((v < vocab) & (key == limit)).to(tl.int32), 0))


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
    inside = v < vocab
    key = _key(tl.load(maxima + set_ * vocab + v, mask=inside, other=0.0))
    limit = tl.load(edge + set_)
    is_level = (inside & (key == limit)).to(tl.int32)
    chosen = inside & ((key > limit) | ((key == limit) & (level_before + tl.cumsum(is_level, 0) <= room)))
    at = above_before + tl.minimum(level_before, room) + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(columns + set_ * k + at, v, mask=chosen)
    tl.store(place + set_ * vocab + v, tl.where(chosen, at, -1), mask=inside)


def all_columns(sets: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `largest_columns` with k = V."""
    columns = torch.arange(vocab, dtype=torch.int32, device=device).expand(sets, vocab).contiguous()
    return columns, columns


def largest_columns(partial: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[sets, parts, V] float32, whose maxima over the parts count -> [sets, k] int32 columns, ascending, and [sets, V] int32: where a column
    stands, or -1. As `selection.largest_columns`; k < V.
    """
    sets, parts, vocab = partial.shape
    device = partial.device
    maxima = torch.empty(sets, vocab, device=device)
    counts = torch.zeros(sets, 3, 2048, dtype=torch.int32, device=device)
    edge = torch.empty(sets, dtype=torch.int32, device=device)
    columns = torch.empty(sets, k, dtype=torch.int32, device=device)
    place = torch.empty(sets, vocab, dtype=torch.int32, device=device)
    blocks = ceil_div(vocab, _BLOCK)
    tally = torch.empty(sets, 2, blocks, dtype=torch.int32, device=device)
    for digit in range(3):
        launch(_count_kernel, (blocks, sets), partial, maxima, counts, vocab, k, PARTS=parts, PASS=digit, BLOCK=_BLOCK)
    launch(_tally_kernel, (blocks, sets), maxima, counts, edge, tally, vocab, k, BLOCK=_BLOCK)
    launch(
        _choose_kernel,
        (blocks, sets),
        maxima,
        edge,
        tally,
        columns,
        place,
        vocab,
        k,
        BLOCK=_BLOCK,
        BLOCKS=1 << (blocks - 1).bit_length(),
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
    student: Tensor
    """[n] int32: the student's token of each entry of W, by teacher column."""
    weight: Tensor
    """[n] float32: its weight."""


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


def ordered_columns(columns: Tensor, place: Tensor, table: ByTeacher, weight: Tensor) -> Columns:
    """From `largest_columns`, and W's weights in the order of `table`; `place` is changed to the new order (unless K is the whole vocabulary, where it is copied)."""
    (sets, k), vocab = columns.shape, place.shape[1]
    if place.data_ptr() == columns.data_ptr():
        place = place.clone()
    index, start, count = torch.empty(3, sets, k, dtype=torch.int32, device=columns.device).unbind()
    heavy = torch.empty(sets, dtype=torch.int32, device=columns.device)
    launch(
        _order_kernel,
        (sets,),
        columns,
        table.start,
        index,
        start,
        count,
        heavy,
        place,
        vocab,
        k,
        HEAVY=HEAVY,
        BLOCK=8192,
        num_warps=16,
    )
    return Columns(index, start, count, heavy, place, table.student, weight)
