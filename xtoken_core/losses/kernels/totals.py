"""Sums of what rows and chunks left, each by one program in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import launch
from xtoken_core.losses.kernels.rows import RowStats

_BLOCK = 1024


@triton.jit
def _cross_entropy_kernel(counted, lse, target, argmax, targets, out, rows, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    correct = tl.zeros([BLOCK], tl.float32)
    for r0 in range(0, rows, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        use = tl.load(counted + r, mask=r < rows, other=0) != 0
        total += tl.load(lse + r, mask=use, other=0.0) - tl.load(target + r, mask=use, other=0.0)
        hit = tl.load(argmax + r, mask=use, other=-1) == tl.load(targets + r, mask=use, other=-2)
        correct += hit.to(tl.float32)
    tl.store(out, tl.sum(total, 0))
    tl.store(out + 1, tl.sum(correct, 0))


@triton.jit
def _sum(x, size, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for i0 in range(0, size, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        total += tl.load(x + i, mask=i < size, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _term_kernel(first, first_size, second, second_size, out, factor, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    a = _sum(first, first_size, BLOCK)
    b = _sum(second, second_size, BLOCK)
    tl.store(out, factor * (a + b))
    tl.store(out + 1, a if PARTS else 0.0)
    tl.store(out + 2, b if PARTS else 0.0)


@triton.jit
def _total_kernel(sums, ce, kd, out, terms):
    total = tl.load(ce).to(tl.float64) * tl.load(sums).to(tl.float64)
    for i in range(terms):
        total += tl.load(kd + i).to(tl.float64) * tl.load(sums + 2 + 3 * i).to(tl.float64)
    tl.store(out, total.to(tl.float32))


def weighted_total(sums: Tensor, ce: Tensor, kd: Tensor) -> Tensor:
    """0-dim float32: ce * CE + kd · KD of what `batch_totals` returned. `kd` is contiguous."""
    out = torch.empty((), device=sums.device)
    launch(_total_kernel, (1,), sums, ce, kd, out, kd.numel())
    return out


def batch_totals(
    counted: Tensor, targets: Tensor, stats: RowStats, terms: list[tuple[Tensor, Tensor | None]], temperature: float
) -> Tensor:
    """[2 + 3n] float32: the CE sum, correct tokens, then of every term its KD times τ² and, where it has two parts, these without τ².

    Args:
        counted: [R] bool rows.
        targets: [R] int64.
        stats: of the rows.
        terms: per term its one or two tensors of float32 to be summed.
        temperature: τ.
    """
    out = torch.empty(2 + 3 * len(terms), device=counted.device)
    launch(
        _cross_entropy_kernel,
        (1,),
        counted,
        stats.lse,
        stats.target,
        stats.argmax,
        targets,
        out,
        counted.numel(),
        BLOCK=_BLOCK,
        num_warps=8,
    )
    for i, (first, second) in enumerate(terms):
        launch(
            _term_kernel,
            (1,),
            first,
            first.numel(),
            first if second is None else second,
            0 if second is None else second.numel(),
            out[2 + 3 * i :],
            temperature**2,
            PARTS=second is not None,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return out
