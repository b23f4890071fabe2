"""p_kl: the student's probabilities projected by W into the teacher's K columns, q_t = p_t W[:, K], row by row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.choose import Columns
from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.kernels.rows import Tile
from xtoken_core.losses.kernels.touched import Touched


@triton.jit
def _project_kernel(
    logits,
    stride,
    first,
    num_rows,
    active,
    lse,
    mass,
    width,
    column_start,
    column_count,
    heavy,
    at,
    entries,
    weight,
    token,
    length,
    room,
    limit,
    probabilities,
    rows_per_set,
    num_sets,
    inv_tau,
    ROWS: tl.constexpr,
    FEW: tl.constexpr,
    LIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Persistent, ROWS rows of a sequence at a time: p of the touched columns into scratch, side by side, so that one access serves all rows; then
    q from there. LIGHT columns at a time, an entry of each per step; where columns have many entries, tiles of COLUMNS x ENTRIES. K is sorted
    by number of entries, so the columns of a block need about as many steps.
    """
    mine = probabilities + tl.program_id(0).to(tl.int64) * limit * ROWS
    lane = tl.arange(0, ROWS)
    groups = tl.cdiv(rows_per_set, ROWS)
    begin = first // rows_per_set * groups
    for group in range(begin + tl.program_id(0), tl.cdiv(first + num_rows, rows_per_set) * groups, tl.num_programs(0)):
        row = group // groups * rows_per_set + group % groups * ROWS + lane
        local = (row - first).to(tl.int64)
        use = (group % groups * ROWS + lane < rows_per_set) & (local >= 0) & (local < num_rows)
        use = use & (tl.load(active + row, mask=use, other=0) != 0)
        if tl.max(use.to(tl.int32), 0) != 0:
            set_ = group // groups % num_sets
            starts, counts = column_start + set_ * width, column_count + set_ * width
            where = at + set_ * entries
            many = tl.load(heavy + set_)
            norm = tl.load(lse + local, mask=use, other=0.0)[None, :]
            touched = tl.load(length + set_)
            for a0 in range(0, touched, FEW):
                a = a0 + tl.arange(0, FEW)
                u = tl.load(token + set_ * room + a, mask=a < touched, other=0)
                there = (a < touched)[:, None] & use[None, :]
                z = tl.load(logits + (local * stride)[None, :] + u[:, None], mask=there, other=float("-inf")).to(tl.float32)
                tl.store(mine + a[:, None] * ROWS + lane[None, :], tl.exp(z * inv_tau - norm), mask=(a < touched)[:, None])
            tl.debug_barrier()
            out = mass + (local * width)[None, :]
            for j0 in range(0, many, COLUMNS):
                j = j0 + tl.arange(0, COLUMNS)
                start = tl.load(starts + j, mask=j < many, other=0)
                count = tl.load(counts + j, mask=j < many, other=0)
                total = tl.zeros([COLUMNS, ENTRIES, ROWS], tl.float32)
                for e0 in range(0, tl.max(count, 0), ENTRIES):
                    e = e0 + tl.arange(0, ENTRIES)
                    live = e[None, :] < count[:, None]
                    entry = start[:, None] + e[None, :]
                    place = (tl.load(where + entry, mask=live, other=1) - 1) * ROWS
                    w = tl.load(weight + entry, mask=live, other=0.0)
                    total += w[:, :, None] * tl.load(
                        mine + place[:, :, None] + lane[None, None, :], mask=live[:, :, None], other=0.0
                    )
                tl.store(out + j[:, None], tl.sum(total, 1), mask=(j < many)[:, None] & use[None, :])
            for j1 in range(many, width, LIGHT):
                i = j1 + tl.arange(0, LIGHT)
                first_entry = tl.load(starts + i, mask=i < width, other=0)
                n = tl.load(counts + i, mask=i < width, other=0)
                sums = tl.zeros([LIGHT, ROWS], tl.float32)
                for e1 in range(0, tl.max(n, 0), 2):  # two, so that one does not wait for the other
                    odd = e1 + 1
                    spot = tl.load(where + first_entry + e1, mask=e1 < n, other=1) - 1
                    spot2 = tl.load(where + first_entry + odd, mask=odd < n, other=1) - 1
                    v = tl.load(weight + first_entry + e1, mask=e1 < n, other=0.0)
                    v2 = tl.load(weight + first_entry + odd, mask=odd < n, other=0.0)
                    x = tl.load(mine + (spot * ROWS)[:, None] + lane[None, :], mask=(e1 < n)[:, None], other=0.0)
                    x2 = tl.load(mine + (spot2 * ROWS)[:, None] + lane[None, :], mask=(odd < n)[:, None], other=0.0)
                    sums += v[:, None] * x + v2[:, None] * x2
                tl.store(out + i[:, None], sums, mask=(i < width)[:, None] & use[None, :])
            tl.debug_barrier()


PROGRAMS, ROWS, WARPS = 264, 4, 8
"""Persistent programs of the projection, two on each of an H100's multiprocessors; rows of each at a time."""


def project(tile: Tile, active: Tensor, columns: Columns, touched: Touched, rows_per_set: int, temperature: float) -> Tensor:
    """q [n, k] float32 of a tile's active rows.

    Args:
        tile: of the student.
        active: [R] bool; other rows of q are garbage.
        columns: K.
        touched: the student's columns that matter.
        rows_per_set: T.
        temperature: τ.
    """
    n, (sets, width), room = tile.logits.shape[0], columns.index.shape, touched.token.shape[1]
    mass = torch.empty(n, width, device=tile.logits.device)
    programs = min(ceil_div(n, ROWS), PROGRAMS)
    probabilities = torch.empty(programs, touched.limit, ROWS, device=tile.logits.device)
    at = touched.rank.index_select(1, columns.student)  # one more than an entry's place in the list; only those of K are read
    launch(
        _project_kernel,
        (programs,),
        tile.logits,
        tile.logits.stride(0),
        tile.first,
        n,
        active,
        tile.lse_tau,
        mass,
        width,
        columns.start,
        columns.count,
        columns.heavy,
        at,
        at.shape[1],
        columns.weight,
        touched.token,
        touched.count,
        room,
        touched.limit,
        probabilities,
        rows_per_set,
        sets,
        1.0 / temperature,
        ROWS=ROWS,
        FEW=1024,
        LIGHT=1024,
        COLUMNS=16,
        ENTRIES=64,
        num_warps=WARPS,
    )
    return mass
