"""One pass that writes the gradient of every term by the student's logits, each number rounded once.

A block of a row at a time: first its touched columns, each from its own logit, into a stash; then the whole block, dense; then the stash over
it. So logits are read once, and the gradient may take their place, unless a gold or h_kl teacher reads other rows of a chunk too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.common import CommonGradient
from xtoken_core.losses.kernels.launch import launch
from xtoken_core.losses.kernels.projected import SparseGradient
from xtoken_core.losses.kernels.rows import RowStats, part, readable
from xtoken_core.losses.kernels.rowsets import mean_log_prob
from xtoken_core.losses.kernels.touched import Placed, Touched
from xtoken_core.losses.kernels.whole import WholeGradient, mixture

PROGRAMS = 6336
"""Persistent programs: many times as many as an H100 holds at a time, so that they end together. Each has a stash of two blocks."""

BLOCK, FEW = 2048, 256
"""Columns of a block; touched columns at a time."""

PARTS = 8
"""Programs that share a row: few rows at a time, so that what is gathered for a row stays in the cache."""


class _Sparse(NamedTuple):
    """A p_kl or same-vocabulary teacher, as the kernel takes it: SparseGradient and Placed. (Triton's tuples have a `values` of their own.)"""

    derivative: Tensor
    owner: Tensor
    share: Tensor
    slope: Tensor
    active: Tensor
    width: int
    number: Tensor
    position: Tensor
    weight: Tensor


class _Common(NamedTuple):
    """A gold or h_kl teacher, as the kernel takes it: CommonGradient."""

    pair: Tensor
    sign: Tensor
    uncommon: int
    slope: Tensor
    chunk: Tensor
    first: Tensor
    last: Tensor
    size: Tensor
    logits: Tensor
    stride: int
    tile: int
    lse: Tensor
    t_chunk: Tensor
    t_first: Tensor
    t_last: Tensor


class _Whole(NamedTuple):
    """A whole-vocabulary teacher, as the kernel takes it: WholeGradient."""

    parts: tuple[Tensor, ...]
    strides: tuple[int, ...]
    weights: tuple[float, ...]
    lse: Tensor
    kl: Tensor
    active: Tensor


@triton.jit
def _dense_part(
    logits, stride, first, lse_tau, local, v, inside, z, p_tau, slope, kd, tau, whole, common, inv_tau, REVERSE: tl.constexpr,
    WHOLE: tl.constexpr, COMMON: tl.constexpr,
):  # fmt: skip
    """Of one row at columns v with logits z: everything but cross-entropy and the sparse parts."""
    g = slope * p_tau
    for i in tl.static_range(len(whole)):
        w = whole[i]
        if tl.load(w.active + local) != 0:
            factor = tl.load(kd + WHOLE[i]).to(tl.float32) * tau
            t = mixture(w.parts, w.strides, w.weights, local, v, inside) * inv_tau - tl.load(w.lse + local)
            if REVERSE:
                s = z * inv_tau - tl.load(lse_tau + local)
                g += factor * p_tau * (s - t - tl.load(w.kl + local))
            else:
                g += factor * (p_tau - tl.exp(t))
    for i in tl.static_range(len(common)):
        c = common[i]
        chunk = tl.load(c.chunk + first + local)
        if chunk >= 0:
            count = tl.load(c.size + chunk)
            t_first, t_last = tl.load(c.t_first + chunk), tl.load(c.t_last + chunk)
            column = tl.load(c.pair + v, mask=inside, other=0)
            paired = inside & (column >= 0)
            alone = inside & (column < 0)
            t = mean_log_prob(c.logits, c.stride, c.tile, c.lse, c.t_chunk, chunk, t_first, t_last, column, paired, inv_tau)
            s = z * inv_tau - tl.load(lse_tau + local)
            if count > 1:
                first_row, last_row = tl.load(c.first + chunk), tl.load(c.last + chunk)
                s = mean_log_prob(logits, stride, first, lse_tau, c.chunk, chunk, first_row, last_row, v, inside, inv_tau)
            sign = tl.load(c.sign + chunk.to(tl.int64) * c.uncommon - 1 - column, mask=alone, other=0).to(tl.float32)
            if REVERSE:
                by_log = tl.exp(s) * tl.where(paired, s - t + 1.0, sign)
            else:
                by_log = tl.where(paired, -tl.exp(t), sign * tl.exp(s))
            g += tl.load(kd + COMMON[i]).to(tl.float32) * tau / count * (by_log - p_tau * tl.load(c.slope + chunk))
    return g


@triton.jit
def _sparse_part(
    teacher, kd, tau, local, set_, at, live, p_tau, room, INDEX: tl.constexpr, SLOTS: tl.constexpr, PROJECTED: tl.constexpr,
    FEW: tl.constexpr,
):  # fmt: skip
    """Of one row at touched columns, by their places in the list: what a p_kl (PROJECTED) or same-vocabulary teacher adds."""
    total = tl.zeros([FEW], tl.float32)
    if tl.load(teacher.active + local) != 0:
        values = teacher.derivative + tl.load(teacher.owner + local).to(tl.int64) * teacher.width
        here = set_.to(tl.int64) * SLOTS * room + at
        number = tl.load(teacher.number + set_ * room + at, mask=live, other=0)
        for s in tl.static_range(SLOTS):
            j = tl.load(teacher.position + here + s * room, mask=s < number, other=0)
            w = tl.load(teacher.weight + here + s * room, mask=s < number, other=0.0)
            total += w * tl.load(values + j, mask=s < number, other=0.0)
        total *= tl.load(kd + INDEX).to(tl.float32) * tau * tl.load(teacher.share + local)
        if PROJECTED:
            total *= p_tau
    return total


@triton.jit
def _gradient_kernel(
    logits, stride, gradient, gradient_stride, first, num_rows, vocab, readable, writable, active, counted, targets, lse, lse_tau, ce, kd,
    upstream, tau, sparse, whole, common, token, rank, room, rows_per_set, num_sets, stash, inv_tau, scale, inv_cap, TEMPERED: tl.constexpr,
    REVERSE: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr, SLOTS: tl.constexpr, PROJECTED: tl.constexpr, SPARSE: tl.constexpr, WHOLE: tl.constexpr,
    COMMON: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Persistent: a program takes every so-many-th of the PARTS of each row, and keeps its stash, used by halves. The parts of a row run side by
    side: few rows at a time, so that teachers' rows gathered from stay in the cache. SLOTS, PROJECTED: of each sparse teacher; SPARSE,
    WHOLE, COMMON: the teachers' numbers.
    """
    mine = stash + tl.program_id(0) * 2 * BLOCK
    factor = tl.full([], 1.0, tl.float32)
    if SCALED:
        factor = tl.load(upstream).to(tl.float32)
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
            by_ce = tl.load(ce).to(tl.float32) * factor * tl.load(counted + local).to(tl.float32)
            target = tl.load(targets + local)
            norm = tl.load(lse + local)
            norm_tau = tl.load(lse_tau + local)
            set_ = (first + local) // rows_per_set % num_sets
            slope = tl.zeros([], tl.float32)
            for i in tl.static_range(len(sparse)):
                has = tl.load(sparse[i].active + local) != 0
                slope += tl.load(kd + SPARSE[i]).to(tl.float32) * tau * tl.load(sparse[i].slope + local, mask=has, other=0.0)
            for v0 in range(part * BLOCK, vocab, PARTS * BLOCK):
                v = v0 + tl.arange(0, BLOCK)
                inside = v < readable
                z = tl.load(base + v, mask=inside, other=float("-inf")).to(tl.float32)
                z = tl.where(v < vocab, z, float("-inf"))
                p = tl.exp(z - norm)
                p_tau = tl.exp(z * inv_tau - norm_tau) if TEMPERED else p
                g = _dense_part(
                    logits, stride, first, lse_tau, local, v, inside, z, p_tau, slope, kd, tau, whole, common, inv_tau, REVERSE, WHOLE,
                    COMMON,
                )  # fmt: skip
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
                        h = _dense_part(
                            logits, stride, first, lse_tau, local, u, live, y, q_tau, slope, kd, tau, whole, common, inv_tau, REVERSE, WHOLE,
                            COMMON,
                        )  # fmt: skip
                        h += by_ce * (q - tl.where(u == target, 1.0, 0.0))
                        for i in tl.static_range(len(sparse)):
                            h += _sparse_part(
                                sparse[i], kd, tau, local, set_, a, live, q_tau, room, SPARSE[i], SLOTS[i], PROJECTED[i], FEW
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


@dataclass(frozen=True)
class TileGradient:
    """The gradients that the terms left for a tile, each with the term's number among the teachers."""

    sparse: list[tuple[int, SparseGradient, Placed, bool]]
    """The last: p_kl (projected by W) or same vocabulary."""
    whole: list[tuple[int, WholeGradient]]
    common: list[tuple[int, CommonGradient]]


def write_gradient(
    logits: Tensor, out: Tensor, first: int, active: Tensor, counted: Tensor, targets: Tensor, stats: RowStats, ce: Tensor, kd: Tensor,
    factor: Tensor | None, parts: TileGradient, touched: Touched | None, rows_per_set: int, temperature: float, reverse: bool, scale: float, cap: float | None,
) -> None:  # fmt: skip
    """Writes the gradient by a tile's raw logits (before scale and cap) of ce * CE + kd · KD.

    Args:
        logits: [n, V] the tile, as capped.
        out: [n, V], whose padding may be overwritten; may be `logits` itself where there are no `parts.common`.
        first: number of the tile's first row.
        active: [R] bool: rows with any term; others get zeros.
        counted: [R] bool: rows with cross-entropy.
        targets: [R] int64.
        stats: of all rows.
        ce: 0-dim, float of any size: factor of the CE sum.
        kd: [n] likewise: factors of the KD sums.
        factor: 0-dim, of both; None: 1.
        parts: of the terms.
        touched: the columns of `parts.sparse`.
        rows_per_set: T.
        temperature: τ.
        reverse: KL(student || teacher).
        scale: of the logits.
        cap: soft cap of the logits.
    """
    n, vocab = logits.shape
    rows = part(first, n)
    sparse = tuple(
        _Sparse(s.values, s.owner, s.share, s.slope, s.active, s.values.shape[1], p.number, p.position, p.weight)
        for _, s, p, _ in parts.sparse
    )
    common = tuple(
        _Common(
            c.pair, c.sign, c.sign.shape[1], c.slope, c.student.chunk, c.student.first, c.student.last, c.student.count,
            c.logits, c.logits.stride(0), c.first, c.lse, c.teacher.chunk, c.teacher.first, c.teacher.last,
        )
        for _, c in parts.common
    )  # fmt: skip
    whole = tuple(_Whole(w.parts, tuple(p.stride(0) for p in w.parts), w.weights, w.lse, w.kl, w.active) for _, w in parts.whole)
    limit = readable(logits)
    if any(readable(p) != limit for w in whole for p in w.parts):
        limit = vocab
    token = rank = targets
    sets = room = 1
    if touched is not None:
        token, rank, (sets, room) = touched.token, touched.rank, touched.token.shape
    programs = min(n * PARTS, PROGRAMS) if sparse else n * PARTS
    stash = torch.empty(programs * 2 * BLOCK if sparse else 0, dtype=out.dtype, device=out.device)
    launch(
        _gradient_kernel, (programs,), logits, logits.stride(0), out, out.stride(0), first, n, vocab, limit, readable(out), rows(active),
        rows(counted), rows(targets), rows(stats.lse), rows(stats.lse_tau), ce, kd, factor, temperature, sparse, whole, common, token, rank, room,
        rows_per_set, sets, stash, 1.0 / temperature, scale, 0.0 if cap is None else 1.0 / cap, TEMPERED=temperature != 1.0, REVERSE=reverse,
        CAPPED=cap is not None, SCALED=factor is not None, SLOTS=tuple(p.position.shape[1] for _, _, p, _ in parts.sparse), PROJECTED=tuple(x for *_, x in parts.sparse),
        SPARSE=tuple(i for i, *_ in parts.sparse), WHOLE=tuple(i for i, _ in parts.whole), COMMON=tuple(i for i, _ in parts.common),
        PARTS=PARTS, BLOCK=BLOCK, FEW=FEW, num_warps=8,
    )  # fmt: skip
