"""The teacher's columns K: column maxima over the rows that count, and every row's logits and log-sum-exp within K."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.kernels.rows import readable

PARTS = 8
"""Programs that share the rows of one block of columns; their maxima are joined afterwards."""


@triton.jit
def _column_maxima_kernel(
    logits, stride, rows, maxima, num_rows, vocab, readable, MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: the maxima of BLOCK columns over its share of the rows, ROWS at a time."""
    part, parts = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    share = tl.cdiv(tl.cdiv(num_rows, parts), ROWS) * ROWS
    for start in range(part * share, tl.minimum((part + 1) * share, num_rows), ROWS):
        row = start + tl.arange(0, ROWS)
        keep = row < num_rows
        if MASKED:
            keep = keep & (tl.load(rows + row, mask=keep, other=0) != 0)
        pointer = logits + row.to(tl.int64)[:, None] * stride + column[None, :]
        z = tl.load(pointer, mask=keep[:, None] & (column < readable)[None, :], other=float("-inf"))
        best = tl.maximum(best, tl.max(z.to(tl.float32), 0))
    tl.store(maxima + part * vocab + column, best, mask=column < vocab)


def column_maxima(logits: Tensor, rows: Tensor | None) -> Tensor:
    """[n, V] logits, [n] bool rows that count (None: all) -> [PARTS, V] float32, whose maxima over the parts are the columns'; -inf where no row counts."""
    n, vocab = logits.shape
    maxima = torch.empty(PARTS, vocab, device=logits.device)
    block = 1024
    launch(
        _column_maxima_kernel,
        (ceil_div(vocab, block), PARTS),
        logits,
        logits.stride(0),
        rows,
        maxima,
        n,
        vocab,
        readable(logits),
        MASKED=rows is not None,
        ROWS=8,
        BLOCK=block,
        num_warps=4,
    )
    return maxima


@triton.jit
def _within_kernel(
    logits,
    stride,
    first,
    active,
    columns,
    within,
    lse,
    width,
    rows_per_set,
    num_sets,
    inv_tau,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: copies its columns K side by side (GATHER), and takes the log-sum-exp of them / τ."""
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    if tl.load(active + row) != 0:
        chosen = columns + row // rows_per_set % num_sets * width
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            j = start + tl.arange(0, BLOCK)
            if GATHER:
                column = tl.load(chosen + j, mask=j < width, other=0)
                z = tl.load(logits + local * stride + column, mask=j < width, other=float("-inf"))
                tl.store(within + local * width + j, z, mask=j < width)
            else:
                z = tl.load(within + local * width + j, mask=j < width, other=float("-inf"))
            x = z.to(tl.float32) * inv_tau
            new_top = tl.maximum(top, tl.max(x, 0))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - safe) + tl.exp(x - safe)
            top = new_top
        tl.store(lse + local, top + tl.log(tl.sum(total, 0)))


def gather_columns(
    logits: Tensor, first: int, active: Tensor, columns: Tensor, rows_per_set: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The logits within K of a tile's active rows, and their log-sum-exp.

    Args:
        logits: [n, V], the tile.
        first: number of its first row.
        active: [R] bool; the results of other rows are garbage.
        columns: [sets, k] int32; row r has set r // rows_per_set % sets.
        rows_per_set: T.
        temperature: τ, of the log-sum-exp alone.

    Returns:
        [n, k] in the dtype of the logits; [n] float32.
    """
    n, (sets, width) = logits.shape[0], columns.shape
    within = torch.empty(n, width, dtype=logits.dtype, device=logits.device)
    lse = torch.empty(n, device=logits.device)
    launch(
        _within_kernel,
        (n,),
        logits,
        logits.stride(0),
        first,
        active,
        columns,
        within,
        lse,
        width,
        rows_per_set,
        sets,
        1.0 / temperature,
        GATHER=True,
        BLOCK=2048,
        num_warps=8,
    )
    return within, lse


def within_lse(within: Tensor, first: int, active: Tensor, temperature: float) -> Tensor:
    """[n, k] logits that are already within K, rows first .. first + n -> [n] float32 log-sum-exp of them / τ."""
    lse = torch.empty(within.shape[0], device=within.device)
    launch(
        _within_kernel,
        (within.shape[0],),
        within,
        0,
        first,
        active,
        within,
        within,
        lse,
        within.shape[1],
        1,
        1,
        1.0 / temperature,
        GATHER=False,
        BLOCK=2048,
        num_warps=8,
    )
    return lse
