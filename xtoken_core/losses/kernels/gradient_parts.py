"""What each teacher adds to the gradient of a row: the dense parts, and the sparse ones at touched columns."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.chunks import mean_log_prob
from xtoken_core.losses.kernels.whole import mixture


class Sparse(NamedTuple):
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


@triton.jit
def dense_part(
    first,
    lse_tau,
    local,
    v,
    inside,
    z,
    p_tau,
    slope,
    kd,
    tau,
    whole,
    common,
    inv_tau,
    REVERSE: tl.constexpr,
    WHOLE: tl.constexpr,
    COMMON: tl.constexpr,
):
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
        chunk = tl.load(c.student.chunk + first + local)
        if chunk >= 0:
            count = tl.load(c.student.size + chunk)
            t_first, t_last = tl.load(c.teacher.first + chunk), tl.load(c.teacher.last + chunk)
            column = tl.load(c.pair + v, mask=inside, other=0)
            paired = inside & (column >= 0)
            alone = inside & (column < 0)
            t = mean_log_prob(c.teacher, chunk, t_first, t_last, column, paired, inv_tau)
            s = z * inv_tau - tl.load(lse_tau + local)
            if count > 1:
                first_row, last_row = tl.load(c.student.first + chunk), tl.load(c.student.last + chunk)
                s = mean_log_prob(c.student, chunk, first_row, last_row, v, inside, inv_tau)
            sign = tl.load(c.sign + chunk.to(tl.int64) * c.uncommon - 1 - column, mask=alone, other=0).to(tl.float32)
            if REVERSE:
                by_log = tl.exp(s) * tl.where(paired, s - t + 1.0, sign)
            else:
                by_log = tl.where(paired, -tl.exp(t), sign * tl.exp(s))
            g += tl.load(kd + COMMON[i]).to(tl.float32) * tau / count * (by_log - p_tau * tl.load(c.slope + chunk))
    return g


@triton.jit
def sparse_part(
    teacher,
    kd,
    tau,
    local,
    set_,
    at,
    live,
    p_tau,
    room,
    INDEX: tl.constexpr,
    SLOTS: tl.constexpr,
    PROJECTED: tl.constexpr,
    FEW: tl.constexpr,
):
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
