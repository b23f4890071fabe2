"""Counting into bins of log-probability, and the signs that counts decide: the steps of `ranks.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from xtoken_core.losses.kernels.chunks import mean_log_prob


@triton.jit
def _coarse_bin(x):
    """128 bins of 1/4 nat; the last holds everything below -32."""
    return tl.minimum(tl.maximum((x * -4.0).to(tl.int32), 0), 127)


@triton.jit
def _fine_bin(x, high, scale, BINS: tl.constexpr):
    return tl.minimum(tl.maximum(((high - x) * scale).to(tl.int32), 0), BINS - 1)


@triton.jit
def chunk_values(side, chunk, first, last, index, size, values, inv_tau, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the chunk's mean log-probabilities at the uncommon columns; returns how many fall into each coarse bin."""
    counts = tl.zeros([128], tl.int32)
    for i0 in range(0, size, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        inside = i < size
        column = tl.load(index + i, mask=inside, other=0)
        x = mean_log_prob(side, chunk, first, last, column, inside, inv_tau)
        tl.store(values + i, x, mask=inside)
        counts += tl.histogram(_coarse_bin(x), 128, mask=inside & (x > LEAST))
    return counts


@triton.jit
def last_bin(counts, k):
    """The coarse bin in which the k-th largest lies; the last if there are fewer."""
    lane = tl.arange(0, 128)
    return tl.min(tl.where(tl.cumsum(counts, 0) >= k, lane, 127), 0)


@triton.jit
def keep_largest(
    values,
    kept_index,
    size,
    histogram,
    code,
    last,
    high,
    scale,
    LEAST: tl.constexpr,
    BINS: tl.constexpr,
    CODED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Moves the values that may be among the k largest to the front, in order, and counts them by fine bin. Returns how many."""
    kept = tl.zeros([], tl.int32)
    for i0 in range(0, size, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        x = tl.load(values + i, mask=i < size, other=LEAST)
        keep = (x > LEAST) & (_coarse_bin(x) <= last)
        at = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.debug_barrier()  # all of the block is read before any of it is overwritten
        tl.store(values + at, x, mask=keep)
        tl.store(kept_index + at, i, mask=keep)
        if CODED:
            tl.store(code + i, tl.zeros([BLOCK], tl.int8), mask=i < size)
        tl.atomic_add(histogram + _fine_bin(x, high, scale, BINS), 1, mask=keep, sem="relaxed", scope="cta")
        kept += tl.sum(keep.to(tl.int32), 0)
    return kept


@triton.jit
def bin_bases(histogram, base, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """base[b] = elements in bins before b; zeroes the histogram, which then hands out places within bins."""
    carry = tl.zeros([], tl.int32)
    for b0 in range(0, BINS, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        n = tl.load(histogram + b, cache_modifier=".cg")
        tl.store(base + b, carry + tl.cumsum(n, 0) - n)
        tl.store(histogram + b, tl.zeros([BLOCK], tl.int32))
        carry += tl.sum(n, 0)
    tl.store(base + BINS, carry)


@triton.jit
def decided_signs(
    values,
    index,
    kept,
    base,
    other_base,
    cursor,
    bin_values,
    bin_index,
    code,
    open_list,
    k,
    high,
    scale,
    BINS: tl.constexpr,
    CODED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Signs of one side's kept elements wherever the bin decides them; the others are listed, by bin and as a list.

    Returns the sum of sign * probability, and the length of the list.
    """
    total = tl.zeros([BLOCK], tl.float32)
    listed = tl.zeros([], tl.int32)
    for a0 in range(0, kept, BLOCK):
        a = a0 + tl.arange(0, BLOCK)
        inside = a < kept
        x = tl.load(values + a, mask=inside, other=float("-inf"))
        i = tl.load(index + a, mask=inside, other=0)
        b = _fine_bin(x, high, scale, BINS)
        b0 = tl.load(base + b, mask=inside, other=0)
        b1 = tl.load(base + b + 1, mask=inside, other=0)
        o0 = tl.load(other_base + b, mask=inside, other=0)
        o1 = tl.load(other_base + b + 1, mask=inside, other=0)
        overlap = (b0 < o1) & (o0 < b1)
        divided = ((b0 < k) & (k < b1)) | ((o0 < k) & (k < o1))
        is_open = inside & (overlap | divided) & ((b0 < k) | (o0 < k))
        sign = tl.where(inside & (b0 < k) & (is_open == 0), tl.where(o1 <= b0, 1, -1), 0)
        total += sign.to(tl.float32) * tl.exp(x)
        if CODED:
            tl.store(code + i, sign.to(tl.int8), mask=inside)
        found = tl.sum(is_open.to(tl.int32), 0)
        if found > 0:
            place = b0 + tl.atomic_add(cursor + b, 1, mask=is_open, sem="relaxed", scope="cta")
            tl.store(bin_values + place, x, mask=is_open)
            tl.store(bin_index + place, i, mask=is_open)
            tl.store(open_list + listed + tl.cumsum(is_open.to(tl.int32), 0) - 1, a, mask=is_open)
            listed += found
    return tl.sum(total, 0), listed


@triton.jit
def open_signs(
    values,
    index,
    listed,
    base,
    other_base,
    bin_values,
    bin_index,
    other_values,
    code,
    open_list,
    k,
    high,
    scale,
    LEAST: tl.constexpr,
    BINS: tl.constexpr,
    CODED: tl.constexpr,
    FEW: tl.constexpr,
    MATES: tl.constexpr,
):
    """Signs of the listed elements of one side, each compared with MATES at a time of its bin. Returns the sum of sign * probability."""
    total = tl.zeros([FEW], tl.float32)
    for a0 in range(0, listed, FEW):
        a = a0 + tl.arange(0, FEW)
        inside = a < listed
        element = tl.load(open_list + a, mask=inside, other=0)
        i = tl.load(index + element, mask=inside, other=0)
        x = tl.load(values + element, mask=inside, other=LEAST)
        b = _fine_bin(x, high, scale, BINS)
        b0 = tl.load(base + b, mask=inside, other=0)
        b1 = tl.load(base + b + 1, mask=inside, other=0)
        rank = b0
        for e0 in range(0, tl.max(b1 - b0, 0), MATES):
            e = b0[:, None] + e0 + tl.arange(0, MATES)[None, :]
            live = e < b1[:, None]
            y = tl.load(bin_values + e, mask=live, other=LEAST)
            before = tl.load(bin_index + e, mask=live, other=0) < i[:, None]
            rank += tl.sum((live & ((y > x[:, None]) | ((y == x[:, None]) & before))).to(tl.int32), 1)
        o0 = tl.load(other_base + b, mask=inside, other=0)
        o1 = tl.load(other_base + b + 1, mask=inside, other=0)
        above = o0
        level = o0
        for e0 in range(0, tl.max(o1 - o0, 0), MATES):
            e = o0[:, None] + e0 + tl.arange(0, MATES)[None, :]
            live = e < o1[:, None]
            y = tl.load(other_values + e, mask=live, other=LEAST)
            above += tl.sum((live & (y > x[:, None])).to(tl.int32), 1)
            level += tl.sum((live & (y >= x[:, None])).to(tl.int32), 1)
        sign = tl.where(rank >= k, 0, tl.where(level <= rank, 1, tl.where(above > rank, -1, 0)))
        total += tl.where(inside, sign.to(tl.float32) * tl.exp(x), 0.0)
        if CODED:
            tl.store(code + i, sign.to(tl.int8), mask=inside)
    return tl.sum(total, 0)
