"""One pass that writes the gradient of every term by the student's logits, each number rounded once.

A block of a row at a time: first its touched columns, each from its own logit, into a stash; then the whole block, dense; then the stash over
it. So logits are read once, and the gradient may take their place, unless a gold or h_kl teacher reads other rows of a chunk too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.gradient_parts import dense_part, sparse_part
from xtoken_core.losses.kernels.launch import launch
from xtoken_core.losses.kernels.rows import Tile, part, readable
from xtoken_core.losses.kernels.sources import StudentRows
from xtoken_core.losses.kernels.tile_gradient import TileGradient
from xtoken_core.spec import LossSpec

PROGRAMS = 6336
"""Persistent programs: many times as many as an H100 holds at a time, so that they end together. Each has a stash of two blocks."""

BLOCK, FEW = 2048, 256
"""Columns of a block; touched columns at a time."""

PARTS = 8
"""Programs that share a row: few rows at a time, so that what is gathered for a row stays in the cache."""


@triton.jit
def _gradient_kernel(
    logits,
    stride,
    gradient,
    gradient_stride,
    first,
    num_rows,
    vocab,
    readable,
    writable,
    active,
    counted,
    targets,
    lse,
    lse_tau,
    factors,
    tau,
    sparse,
    whole,
    common,
    token,
    rank,
    room,
    rows_per_set,
    num_sets,
    stash,
    inv_tau,
    scale,
    inv_cap,
    TEMPERED: tl.constexpr,
    REVERSE: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SLOTS: tl.constexpr,
    PROJECTED: tl.constexpr,
    SPARSE: tl.constexpr,
    WHOLE: tl.constexpr,
    COMMON: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """Persistent: a program takes every so-many-th of the PARTS of each row, and keeps its stash, used by halves. The parts of a row run side by
    side: few rows at a time, so that teachers' rows gathered from stay in the cache. SLOTS, PROJECTED: of each sparse teacher; SPARSE,
    WHOLE, COMMON: the teachers' numbers.
    """
    mine = stash + tl.program_id(0) * 2 * BLOCK
    factor = tl.full([], 1.0, tl.float32)
    if SCALED:
        factor = tl.load(factors.both).to(tl.float32)
    tau *= factor
    half = 0
    for unit in range(tl.program_id(0), num_rows * PARTS, tl.num_programs(0)):
        local, part = unit // PARTS, unit % PARTS
        base = logits + tl.cast(local, tl.int64) * stride
        out = gradient + tl.cast(local, tl.int64) * gradient_stride
        if tl.load(active + local) == 0:
            for v0 in range(part * BLOCK, vocab, PARTS * BLOCK):
                v = v0 + tl.arange(0, BLOCK)
                tl.store(out + v, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=v < writable)
        else:
            by_ce = tl.load(factors.ce).to(tl.float32) * factor * tl.load(counted + local).to(tl.float32)
            target = tl.load(targets + local)
            norm = tl.load(lse + local)
            norm_tau = tl.load(lse_tau + local)
            set_ = (first + local) // rows_per_set % num_sets
            slope = tl.zeros([], tl.float32)
            for i in tl.static_range(len(sparse)):
                has = tl.load(sparse[i].active + local) != 0
                slope += (
                    tl.load(factors.kd + SPARSE[i]).to(tl.float32) * tau * tl.load(sparse[i].slope + local, mask=has, other=0.0)
                )
            for v0 in range(part * BLOCK, vocab, PARTS * BLOCK):
                v = v0 + tl.arange(0, BLOCK)
                inside = v < readable
                z = tl.load(base + v, mask=inside, other=float("-inf")).to(tl.float32)
                z = tl.where(v < vocab, z, float("-inf"))
                p = tl.exp(z - norm)
                p_tau = tl.exp(z * inv_tau - norm_tau) if TEMPERED else p
                g = dense_part(
                    first,
                    lse_tau,
                    local,
                    v,
                    inside,
                    z,
                    p_tau,
                    slope,
                    factors.kd,
                    tau,
                    whole,
                    common,
                    inv_tau,
                    REVERSE,
                    WHOLE,
                    COMMON,
                )
                g += by_ce * (p - tl.where(v == target, 1.0, 0.0))
                if CAPPED:
                    g *= 1.0 - (z * inv_cap) * (z * inv_cap)
                if len(sparse) > 0:
                    low = tl.load(rank + set_ * room + v0 - 1, mask=v0 > 0, other=0)
                    high = tl.load(rank + set_ * room + tl.minimum(v0 + BLOCK, room) - 1)
                    kept = mine + half * BLOCK - low
                    for a0 in range(low, high, FEW):
                        a = a0 + tl.arange(0, FEW)
                        live = a < high
                        u = tl.load(token + set_ * room + a, mask=live, other=0)
                        y = tl.load(base + u, mask=live, other=float("-inf")).to(tl.float32)
                        q = tl.exp(y - norm)
                        q_tau = tl.exp(y * inv_tau - norm_tau) if TEMPERED else q
                        h = dense_part(
                            first,
                            lse_tau,
                            local,
                            u,
                            live,
                            y,
                            q_tau,
                            slope,
                            factors.kd,
                            tau,
                            whole,
                            common,
                            inv_tau,
                            REVERSE,
                            WHOLE,
                            COMMON,
                        )
                        h += by_ce * (q - tl.where(u == target, 1.0, 0.0))
                        for i in tl.static_range(len(sparse)):
                            h += sparse_part(
                                sparse[i],
                                factors.kd,
                                tau,
                                local,
                                set_,
                                a,
                                live,
                                q_tau,
                                room,
                                SPARSE[i],
                                SLOTS[i],
                                PROJECTED[i],
                                FEW,
                            )
                        if CAPPED:
                            h *= 1.0 - (y * inv_cap) * (y * inv_cap)
                        tl.store(kept + a, (h * scale).to(stash.dtype.element_ty), mask=live)
                    tl.debug_barrier()
                tl.store(out + v, (g * scale).to(gradient.dtype.element_ty), mask=v < writable)
                if len(sparse) > 0:
                    tl.debug_barrier()
                    for a0 in range(low, high, FEW):
                        a = a0 + tl.arange(0, FEW)
                        u = tl.load(token + set_ * room + a, mask=a < high, other=0)
                        tl.store(out + u, tl.load(kept + a, mask=a < high, other=0.0), mask=a < high)
                    half = 1 - half


class Factors(NamedTuple):
    """What the sums are multiplied by, on the device, floats of any size."""

    ce: Tensor
    """0-dim."""
    kd: Tensor
    """[n], by teacher."""
    both: Tensor | None = None
    """0-dim, of all; None: 1."""


def write_gradient(tile: Tile, out: Tensor, student: StudentRows, parts: TileGradient, factors: Factors, spec: LossSpec) -> None:
    """Writes the gradient by a tile's raw logits (before scale and cap) of ce * CE + kd · KD.

    Args:
        tile: its logits [n, V] as capped; of all the rows of `student`.
        out: [n, V], whose padding may be overwritten; may be the tile's logits where there are no `parts.common`.
        parts: of the terms; `factors`: of their sums.
        spec: read for `temperature` and `reverse_kl`.
    """
    logits, source, stats = tile.logits, student.source, tile.stats
    (n, vocab), rows = logits.shape, part(tile.first, logits.shape[0])
    sparse = parts.sparse_arguments()
    limits = {readable(logits), *(readable(p) for _, w in parts.whole for p in w.parts)}
    limit = limits.pop() if len(limits) == 1 else vocab
    token, rank, sets, room = parts.touched_or(student.targets)
    programs = min(n * PARTS, PROGRAMS) if sparse else n * PARTS
    launch(
        _gradient_kernel,
        (programs,),
        logits,
        logits.stride(0),
        out,
        out.stride(0),
        tile.first,
        n,
        vocab,
        limit,
        readable(out),
        rows(student.active),
        rows(student.counted),
        rows(student.targets),
        rows(stats.lse),
        rows(stats.lse_tau),
        factors,
        spec.temperature,
        sparse,
        tuple(w for _, w in parts.whole),
        tuple(c for _, c in parts.common),
        token,
        rank,
        room,
        student.length,
        sets,
        torch.empty(programs * 2 * BLOCK if sparse else 0, dtype=out.dtype, device=out.device),
        1.0 / spec.temperature,
        source.scale,
        0.0 if source.cap is None else 1.0 / source.cap,
        TEMPERED=spec.temperature != 1.0,
        REVERSE=spec.reverse_kl,
        CAPPED=source.cap is not None,
        SCALED=factors.both is not None,
        **parts.constants(),
        PARTS=PARTS,
        BLOCK=BLOCK,
        FEW=FEW,
        num_warps=8,
    )
