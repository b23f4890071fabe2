"""The rows of every chunk as a list sorted by chunk, and the mean of a chunk's rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """One side's predictor rows, sorted by chunk (compressed sparse rows); those in no chunk come last."""

    rows: Tensor
    """[R] int32."""
    start: Tensor
    """[N + 1] int32: chunk c has rows[start[c] : start[c + 1]]; none where it is not valid."""
    active: Tensor
    """[R] bool, by row: it belongs to a chunk."""
    chunk: Tensor
    """[R] int32, by row: its chunk, or -1."""


def segments(row_chunk: Tensor, chunks: int) -> Segments:
    """From [R] int64 chunk numbers (-1: none), in any order; on the device throughout."""
    active = row_chunk >= 0
    key = torch.where(active, row_chunk, chunks)
    ordered, rows = key.sort(stable=True)
    start = torch.searchsorted(ordered, torch.arange(chunks + 1, device=key.device), out_int32=True)
    return Segments(rows.int(), start, active, row_chunk.int())


@triton.jit
def mean_log_prob(logits, stride, first, lse, rows, begin, end, column, mask, inv_tau):
    """At `column`s, the mean over the rows begin .. end of a segment of logits / τ - lse; the tile of both begins with row `first`."""
    total = tl.zeros(column.shape, tl.float32)
    for i in range(begin, end):
        row = tl.load(rows + i).to(tl.int64) - first
        z = tl.load(logits + row * stride + column, mask=mask, other=0.0).to(tl.float32)
        total += z * inv_tau - tl.load(lse + row)
    return total / (end - begin)
