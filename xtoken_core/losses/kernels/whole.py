"""The KL over a whole shared vocabulary, of one teacher or of the weighted sum of several teachers' logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import launch
from xtoken_core.losses.kernels.rows import Tile
from xtoken_core.spec import LossSpec


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
    logits,
    stride,
    first,
    active,
    lse_tau,
    parts,
    strides,
    weights,
    target_lse,
    kl,
    vocab,
    inv_tau,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
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


class WholeGradient(NamedTuple):
    """What `gradient.py` needs of a tile to write this teacher's part."""

    parts: tuple[Tensor, ...]
    """Each [n, V]: the teachers' tiles."""
    strides: tuple[int, ...]
    weights: tuple[float, ...]
    lse: Tensor
    """[n] float32: log-sum-exp of the weighted sum / τ."""
    kl: Tensor
    """[n] float32."""
    active: Tensor
    """[n] bool."""


def whole_kl(
    tile: Tile, active: Tensor, parts: tuple[Tensor, ...], weights: tuple[float, ...], kl: Tensor, spec: LossSpec
) -> WholeGradient:
    """KL over the whole vocabulary of a tile's active rows.

    Args:
        tile: of the student.
        active: [R] bool: rows that count.
        parts: the teachers' tiles, [n, V] each.
        weights: of the parts, summing to 1.
        kl: [R] float32; written for the tile's active rows.
        spec: read for `temperature` and `reverse_kl`.
    """
    n, vocab = tile.logits.shape
    lse = torch.zeros(n, device=tile.logits.device)
    strides = tuple(part.stride(0) for part in parts)
    launch(
        _whole_kl_kernel,
        (n,),
        tile.logits,
        tile.logits.stride(0),
        tile.first,
        active,
        tile.lse_tau,
        parts,
        strides,
        weights,
        lse,
        kl,
        vocab,
        1.0 / spec.temperature,
        REVERSE=spec.reverse_kl,
        BLOCK=4096,
        num_warps=8,
    )
    rows = slice(tile.first, tile.first + n)
    return WholeGradient(parts, strides, weights, lse, kl[rows], active[rows])
