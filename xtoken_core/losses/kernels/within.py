"""Same vocabulary: both sides' log_softmax within K, the KL of every counted row, and its derivative by the student's logits within K."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import launch
from xtoken_core.losses.kernels.projected import SparseGradient
from xtoken_core.losses.kernels.rows import Tile
from xtoken_core.spec import LossSpec


@triton.jit
def _within_kl_kernel(
    logits,
    stride,
    first,
    active,
    columns,
    target,
    target_lse,
    kl,
    values,
    owner,
    share,
    slope,
    width,
    rows_per_set,
    num_sets,
    inv_tau,
    REVERSE: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. PARTIAL: a target of -inf is one that the teacher does not know, left out on both sides."""
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    if tl.load(active + row) != 0:
        tl.store(owner + local, local.to(tl.int32))
        tl.store(share + local, 1.0)
        tl.store(slope + local, 0.0)
        chosen = columns + row // rows_per_set % num_sets * width
        norm_t = tl.load(target_lse + local)
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            j = start + tl.arange(0, BLOCK)
            inside = j < width
            x = tl.load(logits + local * stride + tl.load(chosen + j, mask=inside, other=0), mask=inside, other=float("-inf"))
            x = x.to(tl.float32) * inv_tau
            if PARTIAL:
                t = tl.load(target + local * width + j, mask=inside, other=float("-inf"))
                x = tl.where(t == float("-inf"), float("-inf"), x)
            tl.store(values + local * width + j, x, mask=inside)
            new_top = tl.maximum(top, tl.max(x, 0))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - safe) + tl.exp(x - safe)
            top = new_top
        if top > float("-inf"):
            norm_s = top + tl.log(tl.sum(total, 0))
            terms = tl.zeros([BLOCK], tl.float32)
            for start in range(0, width, BLOCK):
                j = start + tl.arange(0, BLOCK)
                s = tl.load(values + local * width + j, mask=j < width, other=float("-inf")) - norm_s
                t = tl.load(target + local * width + j, mask=j < width, other=float("-inf")).to(tl.float32) * inv_tau - norm_t
                known = s > float("-inf")
                if REVERSE:
                    terms += tl.where(known, tl.exp(s) * (s - t), 0.0)
                else:
                    terms += tl.where(known, tl.exp(t) * (t - s), 0.0)
            divergence = tl.sum(terms, 0)
            tl.store(kl + row, divergence)
            for start in range(0, width, BLOCK):
                j = start + tl.arange(0, BLOCK)
                s = tl.load(values + local * width + j, mask=j < width, other=float("-inf")) - norm_s
                t = tl.load(target + local * width + j, mask=j < width, other=float("-inf")).to(tl.float32) * inv_tau - norm_t
                if REVERSE:
                    g = tl.exp(s) * (s - t - divergence)
                else:
                    g = tl.exp(s) - tl.exp(t)
                tl.store(values + local * width + j, tl.where(s > float("-inf"), g, 0.0), mask=j < width)
        else:
            tl.store(kl + row, 0.0)
            for start in range(0, width, BLOCK):
                j = start + tl.arange(0, BLOCK)
                tl.store(values + local * width + j, tl.zeros([BLOCK], tl.float32), mask=j < width)
    else:
        tl.store(kl + row, 0.0)


class Target(NamedTuple):
    """The teacher within K, of a tile's rows."""

    logits: Tensor
    """[n, k]."""
    lse: Tensor
    """[n] float32: log-sum-exp of them / τ."""
    columns: Tensor
    """[sets, k] int32: K."""
    partial: bool
    """The teacher knows only some columns of each row; the others hold -inf."""


def within_kl(tile: Tile, active: Tensor, target: Target, kl: Tensor, rows_per_set: int, spec: LossSpec) -> SparseGradient:
    """KL within K of a tile's active rows, and its derivative by the student's logits / τ.

    Args:
        tile: of the student.
        active: [R] bool: rows that count.
        target: the teacher.
        kl: [R] float32; written for the tile's rows; 0 where none counts or no column is known.
        rows_per_set: T.
        spec: read for `temperature` and `reverse_kl`.
    """
    n, (sets, width) = tile.logits.shape[0], target.columns.shape
    values = torch.empty(n, width, device=tile.logits.device)
    sparse = SparseGradient.over(values, active[tile.first : tile.first + n])
    launch(
        _within_kl_kernel,
        (n,),
        tile.logits,
        tile.logits.stride(0),
        tile.first,
        active,
        target.columns,
        target.logits,
        target.lse,
        kl,
        sparse.values,
        sparse.owner,
        sparse.share,
        sparse.slope,
        width,
        rows_per_set,
        sets,
        1.0 / spec.temperature,
        REVERSE=spec.reverse_kl,
        PARTIAL=target.partial,
        BLOCK=2048,
        num_warps=8,
    )
    return sparse
