"""The uncommon columns of gold and h_kl: L1 between the two sides' probabilities, each sorted descending and cut to k, without sorting.

With r the rank of x on its own side and y_(r) the other side's probability of that rank, the loss is a sum over all kept elements of *both* sides,

    Σ_r |s_(r) - t_(r)| = Σ_s sign(s - t_(r)) s + Σ_t sign(t - s_(r)) t,

and its gradient by a student's probability is that sign. The sign only compares counts: +1 where at most r elements of the other side are >= x,
-1 where more than r of them are > x. So both sides are counted into the same fine bins of log-probability. Let the elements of a bin have
ranks [b0, b1) on this side and [o0, o1) on the other: where o1 <= b0 all signs are +1, where b1 <= o0 all are -1. Only bins in which the two
intervals overlap, or which the cut at k divides, need the order of their elements, and there each is compared with its bin's few others (equal
ones keep index order). Integer counters are the only atomics: what they count does not depend on order, and the places within a bin that
they hand out do not show in the result, which is bitwise reproducible.

Probabilities below exp(-104) are 0 in float32; they take no part. Should a bin hold very many elements (all logits equal, say) the result is right
and the kernel slow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import launch
from xtoken_core.losses.kernels.rowsets import Rows, mean_log_prob

PROGRAMS = 132
"""Persistent programs: one on each of an H100's multiprocessors."""

BLOCK, WARPS = 4096, 16
"""Elements a program looks at at a time, and its warps."""

BINS = 8192
"""Fine bins."""

LEAST = -104.0
"""exp of this is 0 in float32."""


@triton.jit
def _coarse_bin(x):
    """128 bins of 1/4 nat; the last holds everything below -32."""
    return tl.minimum(tl.maximum((x * -4.0).to(tl.int32), 0), 127)


@triton.jit
def _fine_bin(x, high, scale, BINS: tl.constexpr):
    return tl.minimum(tl.maximum(((high - x) * scale).to(tl.int32), 0), BINS - 1)


@triton.jit
def _values(
    logits, stride, tile, lse, row_chunk, chunk, first, last, index, size, values, inv_tau, LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the chunk's mean log-probabilities at the uncommon columns; returns how many fall into each coarse bin."""
    counts = tl.zeros([128], tl.int32)
    for i0 in range(0, size, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        inside = i < size
        column = tl.load(index + i, mask=inside, other=0)
        x = mean_log_prob(logits, stride, tile, lse, row_chunk, chunk, first, last, column, inside, inv_tau)
        tl.store(values + i, x, mask=inside)
        counts += tl.histogram(_coarse_bin(x), 128, mask=inside & (x > LEAST))
    return counts


@triton.jit
def _last_bin(counts, k):
    """The coarse bin in which the k-th largest lies; the last if there are fewer."""
    lane = tl.arange(0, 128)
    return tl.min(tl.where(tl.cumsum(counts, 0) >= k, lane, 127), 0)


@triton.jit
def _keep(
    values, kept_index, size, histogram, code, last, high, scale, LEAST: tl.constexpr, BINS: tl.constexpr, CODED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
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
def _bases(histogram, base, BINS: tl.constexpr, BLOCK: tl.constexpr):
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
def _classify(
    values, index, kept, base, other_base, cursor, bin_values, bin_index, code, open_list, k, high, scale, BINS: tl.constexpr,
    CODED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
def _resolve(
    values, index, listed, base, other_base, bin_values, bin_index, other_values, code, open_list, k, high, scale, LEAST: tl.constexpr,
    BINS: tl.constexpr, CODED: tl.constexpr, FEW: tl.constexpr, MATES: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def _ranks_kernel(
    s_logits, s_stride, s_tile, s_lse, s_chunk, s_firsts, s_lasts, s_index, s_size, t_logits, t_stride, t_tile, t_lse, t_chunk, t_firsts,
    t_lasts, t_index, t_size, num_rows, chunks, k, inv_tau, s_code, l1, signed, floats, ints, LEAST: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr, FEW: tl.constexpr, MATES: tl.constexpr,
):  # fmt: skip
    """Persistent: a program takes every so-many-th chunk and keeps its scratch. Phases that read what others wrote are set apart by barriers."""
    program = tl.program_id(0).to(tl.int64)
    both = s_size + t_size
    s_values = floats + program * 2 * both
    t_values = s_values + s_size
    s_bin = s_values + both
    t_bin = s_bin + s_size
    s_at = ints + program * (3 * both + 4 * BINS + 2)
    t_at = s_at + s_size
    s_list = s_at + both
    t_list = s_list + s_size
    s_index_of = s_list + both
    t_index_of = s_index_of + s_size
    s_hist = s_index_of + both
    t_hist = s_hist + BINS
    s_base = t_hist + BINS
    t_base = s_base + BINS + 1
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        first, last_row = tl.load(s_firsts + chunk), tl.load(s_lasts + chunk)
        if (first <= last_row) & (first >= s_tile) & (first < s_tile + num_rows):
            t_first, t_last = tl.load(t_firsts + chunk), tl.load(t_lasts + chunk)
            code = s_code + tl.cast(chunk, tl.int64) * s_size
            for b0 in range(0, BINS, BLOCK):
                tl.store(s_hist + b0 + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.int32))
                tl.store(t_hist + b0 + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.int32))
            s_counts = _values(
                s_logits, s_stride, s_tile, s_lse, s_chunk, chunk, first, last_row, s_index, s_size, s_values, inv_tau, LEAST,
                BLOCK,
            )  # fmt: skip
            t_counts = _values(
                t_logits, t_stride, t_tile, t_lse, t_chunk, chunk, t_first, t_last, t_index, t_size, t_values, inv_tau, LEAST,
                BLOCK,
            )  # fmt: skip
            last = tl.maximum(_last_bin(s_counts, k), _last_bin(t_counts, k))
            high_bin = tl.min(tl.where(s_counts + t_counts > 0, tl.arange(0, 128), 127), 0)
            high = high_bin.to(tl.float32) * -0.25
            low = tl.where(last == 127, LEAST, (last + 1).to(tl.float32) * -0.25)
            scale = BINS / (high - low)
            tl.debug_barrier()
            s_kept = _keep(s_values, s_index_of, s_size, s_hist, code, last, high, scale, LEAST, BINS, True, BLOCK)
            t_kept = _keep(t_values, t_index_of, t_size, t_hist, code, last, high, scale, LEAST, BINS, False, BLOCK)
            tl.debug_barrier()
            _bases(s_hist, s_base, BINS, BLOCK)
            _bases(t_hist, t_base, BINS, BLOCK)
            tl.debug_barrier()
            s_sum, s_open = _classify(
                s_values, s_index_of, s_kept, s_base, t_base, s_hist, s_bin, s_at, code, s_list, k, high, scale, BINS, True, BLOCK,
            )  # fmt: skip
            t_sum, t_open = _classify(
                t_values, t_index_of, t_kept, t_base, s_base, t_hist, t_bin, t_at, code, t_list, k, high, scale, BINS, False,
                BLOCK,
            )  # fmt: skip
            tl.debug_barrier()
            s_sum += _resolve(
                s_values, s_index_of, s_open, s_base, t_base, s_bin, s_at, t_bin, code, s_list, k, high, scale, LEAST, BINS,
                True, FEW, MATES,
            )  # fmt: skip
            t_sum += _resolve(
                t_values, t_index_of, t_open, t_base, s_base, t_bin, t_at, s_bin, code, t_list, k, high, scale, LEAST, BINS,
                False, FEW, MATES,
            )  # fmt: skip
            tl.store(l1 + chunk, s_sum + t_sum)
            tl.store(signed + chunk, s_sum)
            tl.debug_barrier()


def sorted_distance(
    s_logits: Tensor, s_first: int, s_lse: Tensor, student: Rows, s_index: Tensor, t_logits: Tensor, t_first: int, t_lse: Tensor,
    teacher: Rows, t_index: Tensor, k: int, temperature: float, sign: Tensor, l1: Tensor, signed: Tensor,
) -> None:  # fmt: skip
    """Fills the L1 of the chunks whose student rows are in the tile.

    Args:
        s_logits: [n, V_s] the student's tile; t_logits: [m, V_t] the teacher's.
        s_first: number of the tile's first row; t_first: the teacher's.
        s_lse: [n] float32 log-sum-exp / τ; t_lse: [m].
        student: student rows of all chunks; teacher: their teacher rows.
        s_index: [u] int32 uncommon columns of the student, ascending; t_index: [w] of the teacher.
        k: how many are compared, at most min(u, w).
        temperature: τ.
        sign: [N, u] int8: derivative of l1 by each of the student's uncommon probabilities.
        l1: [N] float32.
        signed: [N] float32: the sum of sign times probability, of the student's.
    """
    chunks, s_size = sign.shape
    t_size = t_index.shape[0]
    if k == 0 or chunks == 0:
        return
    device = s_logits.device
    programs = min(chunks, PROGRAMS)
    floats = torch.empty(programs * 2 * (s_size + t_size), device=device)
    ints = torch.empty(programs * (3 * (s_size + t_size) + 4 * BINS + 2), dtype=torch.int32, device=device)
    launch(
        _ranks_kernel, (programs,),
        s_logits, s_logits.stride(0), s_first, s_lse, student.chunk, student.first, student.last, s_index, s_size,
        t_logits, t_logits.stride(0), t_first, t_lse, teacher.chunk, teacher.first, teacher.last, t_index, t_size,
        s_logits.shape[0], chunks, k, 1.0 / temperature, sign, l1, signed, floats, ints,
        LEAST=LEAST, BINS=BINS, BLOCK=BLOCK, FEW=64, MATES=32, num_warps=WARPS,
    )  # fmt: skip
