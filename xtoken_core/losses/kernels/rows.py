"""Statistics of each row of logits in one streaming pass: log-sum-exp, argmax, the target's logit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import launch

BLOCK = 4096
"""Columns a program reads at a time."""

ALIGN = 16
"""Rows of a multiple of this many columns are read and written in whole vectors."""


def room(columns: int) -> int:
    """`columns` rounded up to a multiple of ALIGN."""
    return -(-columns // ALIGN) * ALIGN


def empty_rows(n: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n, columns] of rows that have room for whole vectors."""
    return torch.empty(n, room(columns), dtype=dtype, device=device)[:, :columns]


def readable(x: Tensor) -> int:
    """How many columns of each row of x [n, V] may be read, so that a vocabulary of odd size (a slice of padded rows) is read in vectors."""
    n, columns = x.shape
    padded = room(columns)
    end = x.storage_offset() + (n - 1) * x.stride(0) + padded
    fits = padded <= x.stride(0) and end * x.element_size() <= x.untyped_storage().nbytes()
    return padded if fits else columns


def part(first: int, n: int) -> Callable[[Tensor], Tensor]:
    """Takes rows first .. first + n of a tensor of all rows; the tensor itself where that is all of them, which is cheaper."""
    return lambda x: x if x.shape[0] == n else x[first : first + n]


@dataclass(frozen=True)
class RowStats:
    """Of the rows of one side, in the order of the flattened batch; rows that are not active hold garbage."""

    lse: Tensor
    """[R] float32: log-sum-exp of the logits."""
    lse_tau: Tensor
    """[R] float32: log-sum-exp of the logits / τ; the same tensor as `lse` where τ is 1."""
    target: Tensor
    """[R] float32: the logit of the row's target."""
    argmax: Tensor
    """[R] int32: the first column of the largest logit."""

    @classmethod
    def empty(cls, rows: int, temperature: float, device: torch.device) -> RowStats:
        """Room for the statistics of `rows` rows."""
        lse = torch.empty(rows, device=device)
        lse_tau = lse if temperature == 1.0 else torch.empty_like(lse)
        return cls(lse, lse_tau, torch.empty_like(lse), torch.empty(rows, dtype=torch.int32, device=device))


class Tile(NamedTuple):
    """Rows first .. last of the student, and what is known of them."""

    first: int
    last: int
    logits: Tensor
    """[n, V_s]."""
    stats: RowStats
    """Of all rows."""

    @property
    def lse_tau(self) -> Tensor:
        """[n] float32."""
        return self.stats.lse_tau[self.first : self.last]


@triton.jit
def _row_stats_kernel(
    logits,
    stride,
    active,
    targets,
    lse,
    lse_tau,
    target,
    argmax,
    vocab,
    readable,
    inv_tau,
    TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: softmax with one running maximum; the block that holds it is read again for its column."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(active + row) != 0:
        base = logits + row * stride
        lane = tl.arange(0, BLOCK)
        top = tl.full([], float("-inf"), tl.float32)
        best = tl.zeros([], tl.int32)
        total = tl.zeros([BLOCK], tl.float32)
        total_tau = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            column = start + lane
            z = tl.load(base + column, mask=column < readable, other=float("-inf")).to(tl.float32)
            z = tl.where(column < vocab, z, float("-inf"))
            new_top = tl.maximum(top, tl.max(z, 0))
            best = tl.where(new_top > top, start, best)
            total = total * tl.exp(top - new_top) + tl.exp(z - new_top)
            if TEMPERED:
                total_tau = total_tau * tl.exp((top - new_top) * inv_tau) + tl.exp((z - new_top) * inv_tau)
            top = new_top
        tl.store(lse + row, top + tl.log(tl.sum(total, 0)))
        if TEMPERED:
            tl.store(lse_tau + row, top * inv_tau + tl.log(tl.sum(total_tau, 0)))
        column = best + lane
        z = tl.load(base + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        tl.store(argmax + row, tl.min(tl.where(z == top, column, 2147483647), 0))
        tl.store(target + row, tl.load(base + tl.load(targets + row)).to(tl.float32))


def row_stats(logits: Tensor, active: Tensor, targets: Tensor, stats: RowStats, first: int, temperature: float) -> None:
    """Fills `stats` for the rows that a tile holds.

    Args:
        logits: [n, V], columns contiguous: the tile.
        active: [R] bool: rows to read at all.
        targets: [R] int64.
        stats: of all R rows.
        first: number of the tile's first row.
        temperature: τ.
    """
    n, vocab = logits.shape
    rows = part(first, n)
    launch(
        _row_stats_kernel,
        (n,),
        logits,
        logits.stride(0),
        rows(active),
        rows(targets),
        rows(stats.lse),
        rows(stats.lse_tau),
        rows(stats.target),
        rows(stats.argmax),
        vocab,
        readable(logits),
        1.0 / temperature,
        TEMPERED=temperature != 1.0,
        BLOCK=BLOCK,
        num_warps=8,
    )
