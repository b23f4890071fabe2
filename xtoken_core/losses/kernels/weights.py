"""p_kl: the gradient by the weights of a learnable W."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.kernels.projected import SparseGradient
from xtoken_core.losses.kernels.rows import Tile
from xtoken_core.losses.kernels.touched import Placed, Touched


@triton.jit
def _weight_gradient_kernel(
    logits,
    stride,
    first,
    num_rows,
    lse,
    values,
    active,
    owner,
    share,
    width,
    token,
    count,
    number,
    position,
    slot,
    partial,
    vocab,
    room,
    rows_per_set,
    num_sets,
    inv_tau,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a block of touched tokens: Σ over this program's rows of p_tu G_j / n for each of W's entries, in a fixed order."""
    set_, part, parts = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(count + set_)
    if tl.program_id(0) * BLOCK < length:
        inside = at < length
        u = tl.load(token + set_ * room + at, mask=inside, other=0)
        n = tl.load(number + set_ * room + at, mask=inside, other=0)
        for s in range(SLOTS):
            here = set_.to(tl.int64) * SLOTS * room + s * room + at
            live = s < n
            j = tl.load(position + here, mask=live, other=0)
            total = tl.zeros([BLOCK], tl.float32)
            for local in range(part, num_rows, parts):
                row = first + local
                if (tl.load(active + local) != 0) & (row // rows_per_set % num_sets == set_):
                    mine = tl.load(owner + local)
                    z = tl.load(logits + tl.cast(local, tl.int64) * stride + u, mask=live, other=float("-inf")).to(tl.float32)
                    g = tl.load(values + mine.to(tl.int64) * width + j, mask=live, other=0.0)
                    total += tl.exp(z * inv_tau - tl.load(lse + local)) * g * tl.load(share + local)
            into = u.to(tl.int64) * SLOTS + tl.load(slot + here, mask=live, other=0)
            pointer = partial + (part * num_sets + set_).to(tl.int64) * vocab * SLOTS + into
            tl.store(pointer, total, mask=live)


def weight_gradient(
    tile: Tile, sparse: SparseGradient, touched: Touched, placed: Placed, rows_per_set: int, temperature: float
) -> Tensor:
    """[V_s, slots] float32: the derivative by W's weights of the sum of the tile's KLs (not yet times τ² and the coefficient)."""
    n, vocab = tile.logits.shape
    sets, slots, _ = placed.position.shape
    parts, block = min(16, max(1, n // 64)), 128
    partial = torch.zeros(parts, sets, vocab, slots, device=tile.logits.device)
    launch(
        _weight_gradient_kernel,
        (ceil_div(vocab, block), sets, parts),
        tile.logits,
        tile.logits.stride(0),
        tile.first,
        n,
        tile.lse_tau,
        sparse.values,
        sparse.active,
        sparse.owner,
        sparse.share,
        sparse.values.shape[1],
        touched.token,
        touched.count,
        placed.number,
        placed.position,
        placed.slot,
        partial,
        vocab,
        touched.token.shape[1],
        rows_per_set,
        sets,
        1.0 / temperature,
        SLOTS=slots,
        BLOCK=block,
        num_warps=4,
    )
    return partial.sum((0, 1))
