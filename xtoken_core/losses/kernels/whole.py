"""The KL over a whole shared vocabulary, of one teacher or of the weighted sum of several teachers' logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import launch


@triton.jit
def mixture(parts, strides, weights, local, column, inside):
    """The weighted sum of the parts' logits at a row's columns; -inf outside."""
    total = tl.zeros(column.shape, tl.float32)
    for i in tl.static_range(len(parts)):
        z = tl.load(parts[i] + tl.cast(local, tl.int64) * strides[i] + column, mask=inside, other=0.0)
        total += weights[i] * z.to(tl.float32)
    return tl.where(inside, total, float("-inf"))


@triton.jit
def _whole_kl_kernel(
    logits, stride, first, active, lse_tau, parts, strides, weights, target_lse, kl, vocab, inv_tau, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: the teacher's log-sum-exp / τ, then the KL."""
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    if tl.load(active + row) != 0:
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = mixture(parts, strides, weights, local, column, column < vocab) * inv_tau
            new_top = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - new_top) + tl.exp(x - new_top)
            top = new_top
        norm_t = top + tl.log(tl.sum(total, 0))
        tl.store(target_lse + local, norm_t)
        norm_s = tl.load(lse_tau + local)
        terms = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocab
            t = mixture(parts, strides, weights, local, column, inside) * inv_tau - norm_t
            s = tl.load(logits + local * stride + column, mask=inside, other=0.0).to(tl.float32) * inv_tau - norm_s
            if REVERSE:
                terms += tl.where(inside, tl.exp(s) * (s - t), 0.0)
            else:
                terms += tl.where(inside, tl.exp(t) * (t - s), 0.0)
        tl.store(kl + row, tl.sum(terms, 0))
    else:
        tl.store(kl + row, 0.0)


@dataclass(frozen=True)
class WholeGradient:
    """What `gradient.py` needs of a tile to write this teacher's part."""

    parts: tuple[Tensor, ...]
    """Each [n, V]: the teachers' tiles."""
    weights: tuple[float, ...]
    lse: Tensor
    """[n] float32: log-sum-exp of the weighted sum / τ."""
    kl: Tensor
    """[n] float32."""
    active: Tensor
    """[n] bool."""


def whole_kl(
    logits: Tensor, first: int, active: Tensor, lse_tau: Tensor, parts: tuple[Tensor, ...], weights: tuple[float, ...], kl: Tensor,
    temperature: float, reverse: bool,
) -> WholeGradient:  # fmt: skip
    """KL over the whole vocabulary of a tile's active rows.

    Args:
        logits: [n, V], the student's tile.
        first: number of its first row.
        active: [R] bool: rows that count.
        lse_tau: [n] float32: the student's log-sum-exp / τ.
        parts: the teachers' tiles, [n, V] each.
        weights: of the parts, summing to 1.
        kl: [R] float32; written for the tile's active rows.
        temperature: τ.
        reverse: KL(student || teacher).
    """
    n, vocab = logits.shape
    lse = torch.zeros(n, device=logits.device)
    launch(
        _whole_kl_kernel, (n,),
        logits, logits.stride(0), first, active, lse_tau, parts, tuple(p.stride(0) for p in parts), weights, lse, kl, vocab,
        1.0 / temperature, REVERSE=reverse, BLOCK=4096, num_warps=8,
    )  # fmt: skip
    rows = slice(first, first + n)
    return WholeGradient(parts, weights, lse, kl[rows], active[rows])
