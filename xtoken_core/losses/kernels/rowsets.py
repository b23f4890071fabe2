"""Which rows count: those whose next token does."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import ceil_div, launch

_BLOCK = 512


class Counted(NamedTuple):
    """The rows of one side."""

    counted: Tensor
    """[R] bool: rows whose next token and sample count."""
    targets: Tensor
    """[R] int64: the tokens they predict."""
    scope: Tensor
    """[R] bool: rows whose own token and next one are unmasked; see `selection.scope_mask`."""


@triton.jit
def _mark_counted_kernel(ids, mask, samples, counted, targets, scope, length, rows, BLOCK: tl.constexpr):
    """Row t counts where token t+1 and the sample do, and predicts that token; `scope`: tokens t and t+1 are unmasked."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    inner = inside & (row % length < length - 1)
    following = tl.load(mask + row + 1, mask=inner, other=0) != 0
    sample = tl.load(samples + row // length, mask=inside, other=0) != 0
    tl.store(counted + row, following & sample & inner, mask=inside)
    tl.store(scope + row, following & inner & (tl.load(mask + row, mask=inside, other=0) != 0), mask=inside)
    tl.store(targets + row, tl.load(ids + row + 1, mask=inner, other=0), mask=inside)


def counted_rows(input_ids: Tensor, token_mask: Tensor, sample_mask: Tensor) -> Counted:
    """As `selection.next_token_mask`, `next_token_ids` and `scope_mask`."""
    rows = input_ids.numel()
    counted = torch.empty(rows, dtype=torch.bool, device=input_ids.device)
    targets = torch.empty(rows, dtype=torch.int64, device=input_ids.device)
    scope = torch.empty_like(counted)
    launch(
        _mark_counted_kernel,
        (ceil_div(rows, _BLOCK),),
        input_ids.contiguous(),
        token_mask.contiguous(),
        sample_mask.contiguous(),
        counted,
        targets,
        scope,
        input_ids.shape[1],
        rows,
        BLOCK=_BLOCK,
    )
    return Counted(counted, targets, scope)


@triton.jit
def _count_tokens_kernel(mask, samples, out, length, rows, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for row0 in range(0, rows, BLOCK):
        row = row0 + tl.arange(0, BLOCK)
        use = (row < rows) & (row % length > 0)
        use = use & (tl.load(mask + row, mask=use, other=0) != 0)
        total += (use & (tl.load(samples + row // length, mask=use, other=0) != 0)).to(tl.int32)
    tl.store(out, tl.sum(total, 0).to(tl.float64))


def counted_tokens(token_mask: Tensor, sample_mask: Tensor) -> Tensor:
    """0-dim float64: how many rows count; see `counted_rows`."""
    out = torch.empty((), dtype=torch.float64, device=token_mask.device)
    launch(
        _count_tokens_kernel,
        (1,),
        token_mask.contiguous(),
        sample_mask.contiguous(),
        out,
        token_mask.shape[1],
        token_mask.numel(),
        BLOCK=2048,
        num_warps=8,
    )
    return out
