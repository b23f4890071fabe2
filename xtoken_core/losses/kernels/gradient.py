"""One pass that writes the gradient of every term by the student's logits, each number rounded once.

Per row: first the touched columns, each from its own logit, into a stash; then the whole row, dense; then the stash over it. So the gradient may take
the place of the logits it is formed from, unless a gold or h_kl teacher reads other rows of a chunk too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.common import CommonGradient
from xtoken_core.losses.kernels.projected import SparseGradient
from xtoken_core.losses.kernels.rows import RowStats, readable
from xtoken_core.losses.kernels.rowsets import mean_log_prob
from xtoken_core.losses.kernels.touched import Placed, Touched
from xtoken_core.losses.kernels.whole import WholeGradient, mixture

PROGRAMS = 528
"""Persistent programs: four on each of an H100's multiprocessors."""


class _Sparse(NamedTuple):
    """A p_kl or same-vocabulary teacher, as the kernel takes it: its factor, then SparseGradient and Placed. (Triton's tuples have a `values` of their own.)"""

    factor: Tensor
    derivative: Tensor
    owner: Tensor
    share: Tensor
    slope: Tensor
    active: Tensor
    width: int
    position: Tensor
    weight: Tensor


class _Common(NamedTuple):
    """A gold or h_kl teacher, as the kernel takes it: its factor, then CommonGradient."""

    factor: Tensor
    pair: Tensor
    sign: Tensor
    uncommon: int
    slope: Tensor
    chunk: Tensor
    first: Tensor
    last: Tensor
    count: Tensor
    logits: Tensor
    stride: int
    tile: int
    lse: Tensor
    t_chunk: Tensor
    t_first: Tensor
    t_last: Tensor


class _Whole(NamedTuple):
    """A whole-vocabulary teacher, as the kernel takes it: its factor, then WholeGradient."""

    factor: Tensor
    parts: tuple[Tensor, ...]
    strides: tuple[int, ...]
    weights: tuple[float, ...]
    lse: Tensor
    kl: Tensor
    active: Tensor


@triton.jit
def _dense_part(logits, stride, first, lse_tau, local, v, inside, z, p_tau, dense, whole, common, inv_tau, REVERSE: tl.constexpr):
    """Of one row at columns v with logits z: everything but cross-entropy and the sparse parts."""
    g = dense * p_tau
    for i in tl.static_range(len(whole)):
        w = whole[i]
        if tl.load(w.active + local) != 0:
            t = mixture(w.parts, w.strides, w.weights, local, v, inside) * inv_tau - tl.load(w.lse + local)
            if REVERSE:
                s = z * inv_tau - tl.load(lse_tau + local)
                g += tl.load(w.factor) * p_tau * (s - t - tl.load(w.kl + local))
            else:
                g += tl.load(w.factor) * (p_tau - tl.exp(t))
    for i in tl.static_range(len(common)):
        c = common[i]
        chunk = tl.load(c.chunk + first + local)
        if chunk >= 0:
            count = tl.load(c.count + chunk)
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
            g += tl.load(c.factor) / count * (by_log - p_tau * tl.load(c.slope + chunk))
    return g


@triton.jit
def _gradient_kernel(
    logits, stride, gradient, gradient_stride, first, num_rows, vocab, readable, writable, active, counted, targets, lse, lse_tau, ce_factor,
    sparse, whole, common, token, count, room, rows_per_set, num_sets, stash, inv_tau, scale, inv_cap, TEMPERED: tl.constexpr, REVERSE: tl.constexpr,
    CAPPED: tl.constexpr, SLOTS: tl.constexpr, PROJECTED: tl.constexpr, BLOCK: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Persistent: a program takes every so-many-th row and keeps its stash. SLOTS, PROJECTED: of each sparse teacher."""
    mine = stash + tl.program_id(0).to(tl.int64) * room
    for local in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        base = logits + tl.cast(local, tl.int64) * stride
        out = gradient + tl.cast(local, tl.int64) * gradient_stride
        if tl.load(active + local) == 0:
            for v0 in range(0, vocab, BLOCK):
                v = v0 + tl.arange(0, BLOCK)
                tl.store(out + v, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=v < writable)
        else:
            ce = tl.load(ce_factor) * tl.load(counted + local).to(tl.float32)
            target = tl.load(targets + local)
            norm = tl.load(lse + local)
            norm_tau = tl.load(lse_tau + local)
            set_ = (first + local) // rows_per_set % num_sets
            dense = tl.zeros([], tl.float32)
            length = tl.zeros([], tl.int32)
            for i in tl.static_range(len(sparse)):
                has = tl.load(sparse[i].active + local) != 0
                dense += tl.load(sparse[i].factor) * tl.load(sparse[i].slope + local, mask=has, other=0.0)
            if len(sparse) > 0:
                length = tl.load(count + set_)
            for a0 in range(0, length, FEW):
                a = a0 + tl.arange(0, FEW)
                inside = a < length
                v = tl.load(token + set_ * room + a, mask=inside, other=0)
                z = tl.load(base + v, mask=inside, other=float("-inf")).to(tl.float32)
                p = tl.exp(z - norm)
                p_tau = tl.exp(z * inv_tau - norm_tau) if TEMPERED else p
                g = _dense_part(
                    logits, stride, first, lse_tau, local, v, inside, z, p_tau, dense, whole, common, inv_tau, REVERSE
                )
                g += ce * (p - tl.where(v == target, 1.0, 0.0))
                for i in tl.static_range(len(sparse)):
                    if tl.load(sparse[i].active + local) != 0:
                        values = sparse[i].derivative + tl.load(sparse[i].owner + local).to(tl.int64) * sparse[i].width
                        h = tl.zeros([FEW], tl.float32)
                        here = set_.to(tl.int64) * SLOTS[i] * room + a
                        live = inside
                        for s in range(SLOTS[i]):
                            j = tl.load(sparse[i].position + here + s * room, mask=live, other=-1)
                            live = j >= 0
                            w = tl.load(sparse[i].weight + here + s * room, mask=live, other=0.0)
                            h += w * tl.load(values + j, mask=live, other=0.0)
                        h *= tl.load(sparse[i].factor) * tl.load(sparse[i].share + local)
                        if PROJECTED[i]:
                            h *= p_tau
                        g += h
                if CAPPED:
                    g *= 1.0 - (z * inv_cap) * (z * inv_cap)
                tl.store(mine + a, (g * scale).to(stash.dtype.element_ty), mask=inside)
            tl.debug_barrier()
            for v0 in range(0, vocab, BLOCK):
                v = v0 + tl.arange(0, BLOCK)
                inside = v < readable
                z = tl.load(base + v, mask=inside, other=float("-inf")).to(tl.float32)
                z = tl.where(v < vocab, z, float("-inf"))
                p = tl.exp(z - norm)
                p_tau = tl.exp(z * inv_tau - norm_tau) if TEMPERED else p
                g = _dense_part(
                    logits, stride, first, lse_tau, local, v, inside, z, p_tau, dense, whole, common, inv_tau, REVERSE
                )
                g += ce * (p - tl.where(v == target, 1.0, 0.0))
                if CAPPED:
                    g *= 1.0 - (z * inv_cap) * (z * inv_cap)
                tl.store(out + v, (g * scale).to(gradient.dtype.element_ty), mask=v < writable)
            tl.debug_barrier()
            for a0 in range(0, length, FEW):
                a = a0 + tl.arange(0, FEW)
                v = tl.load(token + set_ * room + a, mask=a < length, other=0)
                tl.store(out + v, tl.load(mine + a, mask=a < length, other=0.0), mask=a < length)


@dataclass(frozen=True)
class TileGradient:
    """The gradients that the terms left for a tile, each with the term's number among the teachers."""

    sparse: list[tuple[int, SparseGradient, Placed, bool]]
    """The last: p_kl (projected by W) or same vocabulary."""
    whole: list[tuple[int, WholeGradient]]
    common: list[tuple[int, CommonGradient]]


def write_gradient(
    logits: Tensor, out: Tensor, first: int, active: Tensor, counted: Tensor, targets: Tensor, stats: RowStats, ce: Tensor, kd: Tensor,
    parts: TileGradient, touched: Touched | None, rows_per_set: int, temperature: float, reverse: bool, scale: float, cap: float | None,
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
        ce: 0-dim float32 factor of the CE sum.
        kd: [n] float32 factors of the KD sums, τ² not yet in them.
        parts: of the terms.
        touched: the columns of `parts.sparse`.
        rows_per_set: T.
        temperature: τ.
        reverse: KL(student || teacher).
        scale: of the logits.
        cap: soft cap of the logits.
    """
    n, vocab = logits.shape
    rows = slice(first, first + n)
    factor = kd * temperature  # τ² from the loss, 1 / τ from the derivative
    sparse = tuple(
        _Sparse(factor[i], s.values, s.owner, s.share, s.slope, s.active, s.values.shape[1], p.position, p.weight)
        for i, s, p, _ in parts.sparse
    )
    common = tuple(
        _Common(
            factor[i],
            c.pair,
            c.sign,
            c.sign.shape[1],
            c.slope,
            c.student.chunk,
            c.student.first,
            c.student.last,
            c.student.count,
            c.logits,
            c.logits.stride(0),
            c.first,
            c.lse,
            c.teacher.chunk,
            c.teacher.first,
            c.teacher.last,
        )  # fmt: skip
        for i, c in parts.common
    )
    whole = tuple(
        _Whole(factor[i], w.parts, tuple(p.stride(0) for p in w.parts), w.weights, w.lse, w.kl, w.active) for i, w in parts.whole
    )
    limit = readable(logits)
    if any(readable(p) != limit for w in whole for p in w.parts):
        limit = vocab
    if touched is None:
        assert not sparse
        token = count = targets
        sets, width, programs = 1, 0, min(n, 8 * PROGRAMS)
        stash = torch.empty(0, dtype=out.dtype, device=out.device)
    else:
        token, count, (sets, width) = touched.token, touched.count, touched.token.shape
        programs = min(n, PROGRAMS)
        stash = torch.empty(programs * width, dtype=out.dtype, device=out.device)
    _gradient_kernel[(programs,)](
        logits, logits.stride(0), out, out.stride(0), first, n, vocab, limit, readable(out), active[rows], counted[rows],
        targets[rows], stats.lse[rows], stats.lse_tau[rows], ce, sparse, whole, common, token, count, width, rows_per_set, sets, stash, 1.0 / temperature, scale,
        0.0 if cap is None else 1.0 / cap, TEMPERED=temperature != 1.0, REVERSE=reverse, CAPPED=cap is not None,
        SLOTS=tuple(p.position.shape[1] for _, _, p, _ in parts.sparse), PROJECTED=tuple(x for *_, x in parts.sparse), BLOCK=4096,
        FEW=1024, num_warps=8,
    )  # fmt: skip


__all__ = ["TileGradient", "write_gradient"]
