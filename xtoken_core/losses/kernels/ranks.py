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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.chunks import Side
from xtoken_core.losses.kernels.common import Split
from xtoken_core.losses.kernels.counting import bin_bases, chunk_values, decided_signs, keep_largest, last_bin, open_signs
from xtoken_core.losses.kernels.launch import launch

PROGRAMS = 132
"""Persistent programs: one on each of an H100's multiprocessors."""

BLOCK, WARPS = 4096, 16
"""Elements a program looks at at a time, and its warps."""

BINS = 8192
"""Fine bins."""

LEAST = -104.0
"""exp of this is 0 in float32."""


@triton.jit
def _ranks_kernel(
    student,
    teacher,
    s_index,
    s_size,
    t_index,
    t_size,
    num_rows,
    chunks,
    k,
    inv_tau,
    s_code,
    l1,
    signed,
    floats,
    ints,
    LEAST: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
    MATES: tl.constexpr,
):
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
        first, last_row = tl.load(student.first + chunk), tl.load(student.last + chunk)
        if (first <= last_row) & (first >= student.tile) & (first < student.tile + num_rows):
            t_first, t_last = tl.load(teacher.first + chunk), tl.load(teacher.last + chunk)
            code = s_code + tl.cast(chunk, tl.int64) * s_size
            for b0 in range(0, BINS, BLOCK):
                tl.store(s_hist + b0 + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.int32))
                tl.store(t_hist + b0 + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.int32))
            s_counts = chunk_values(student, chunk, first, last_row, s_index, s_size, s_values, inv_tau, LEAST, BLOCK)
            t_counts = chunk_values(teacher, chunk, t_first, t_last, t_index, t_size, t_values, inv_tau, LEAST, BLOCK)
            last = tl.maximum(last_bin(s_counts, k), last_bin(t_counts, k))
            high_bin = tl.min(tl.where(s_counts + t_counts > 0, tl.arange(0, 128), 127), 0)
            high = high_bin.to(tl.float32) * -0.25
            low = tl.where(last == 127, LEAST, (last + 1).to(tl.float32) * -0.25)
            scale = BINS / (high - low)
            tl.debug_barrier()
            s_kept = keep_largest(s_values, s_index_of, s_size, s_hist, code, last, high, scale, LEAST, BINS, True, BLOCK)
            t_kept = keep_largest(t_values, t_index_of, t_size, t_hist, code, last, high, scale, LEAST, BINS, False, BLOCK)
            tl.debug_barrier()
            bin_bases(s_hist, s_base, BINS, BLOCK)
            bin_bases(t_hist, t_base, BINS, BLOCK)
            tl.debug_barrier()
            s_sum, s_open = decided_signs(
                s_values, s_index_of, s_kept, s_base, t_base, s_hist, s_bin, s_at, code, s_list, k, high, scale, BINS, True, BLOCK,
            )  # fmt: skip
            t_sum, t_open = decided_signs(
                t_values, t_index_of, t_kept, t_base, s_base, t_hist, t_bin, t_at, code, t_list, k, high, scale, BINS, False,
                BLOCK,
            )  # fmt: skip
            tl.debug_barrier()
            s_sum += open_signs(
                s_values, s_index_of, s_open, s_base, t_base, s_bin, s_at, t_bin, code, s_list, k, high, scale, LEAST, BINS,
                True, FEW, MATES,
            )  # fmt: skip
            t_sum += open_signs(
                t_values, t_index_of, t_open, t_base, s_base, t_bin, t_at, s_bin, code, t_list, k, high, scale, LEAST, BINS,
                False, FEW, MATES,
            )  # fmt: skip
            tl.store(l1 + chunk, s_sum + t_sum)
            tl.store(signed + chunk, s_sum)
            tl.debug_barrier()


class Signs(NamedTuple):
    """What `sorted_distance` finds of each chunk."""

    sign: Tensor
    """[N, u] int8: derivative of `l1` by each of the student's uncommon probabilities."""
    l1: Tensor
    """[N] float32."""
    signed: Tensor
    """[N] float32: the sum of sign times probability, of the student's."""


def sorted_distance(student: Side, teacher: Side, split: Split, k: int, temperature: float, found: Signs) -> None:
    """Fills `found` for the chunks whose student rows are in the tile.

    Args:
        student: the student's tile.
        teacher: the teacher's.
        split: the uncommon columns.
        k: how many are compared; at most as many as either side has.
        temperature: τ.
        found: of all chunks.
    """
    chunks, s_size = found.sign.shape
    t_size = split.uncommon_teacher.shape[0]
    if k == 0 or chunks == 0:
        return
    device = student.logits.device
    programs = min(chunks, PROGRAMS)
    floats = torch.empty(programs * 2 * (s_size + t_size), device=device)
    ints = torch.empty(programs * (3 * (s_size + t_size) + 4 * BINS + 2), dtype=torch.int32, device=device)
    launch(
        _ranks_kernel,
        (programs,),
        student,
        teacher,
        split.uncommon_student,
        s_size,
        split.uncommon_teacher,
        t_size,
        student.logits.shape[0],
        chunks,
        k,
        1.0 / temperature,
        found.sign,
        found.l1,
        found.signed,
        floats,
        ints,
        LEAST=LEAST,
        BINS=BINS,
        BLOCK=BLOCK,
        FEW=64,
        MATES=32,
        num_warps=WARPS,
    )
