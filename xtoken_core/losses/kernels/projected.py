"""p_kl: the student's probabilities projected by W into the teacher's K columns, and the KL of every chunk.

With p the student's softmax(z / τ), q_t = p_t W[:, K] is formed row by row (`project`); one program a chunk then takes the mean of its rows, both
sides' KL, and G = dKL/dQ_c (`chunk_kl`). The gradient of a row t of chunk c (n rows) is

    dKL_c / dz_tv = p_tv (h_tv - s_t) / τ,   h_tv = 1/n Σ_j W_vj G_j (touched columns only),   s_t = Σ_v p_tv h_tv = 1/n Σ_j G_j q_tj

so that beside the dense slope -s_t it is sparse; `gradient.py` writes it. Formulas: `reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.choose import Columns
from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.kernels.rowsets import Rows, mean_log_prob
from xtoken_core.losses.kernels.touched import ByTeacher, Placed, Touched
from xtoken_core.losses.selection import EPSILON, FLOOR


@triton.jit
def _project_kernel(
    logits, stride, first, num_rows, active, lse, mass, width, column_start, column_count, heavy, at, entries, weight, token, length, room, limit,
    probabilities, rows_per_set, num_sets, inv_tau, ROWS: tl.constexpr, FEW: tl.constexpr, LIGHT: tl.constexpr, COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
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


def project(
    logits: Tensor, first: int, active: Tensor, lse: Tensor, columns: Columns, table: ByTeacher, weight: Tensor, touched: Touched,
    rows_per_set: int, temperature: float,
) -> Tensor:  # fmt: skip
    """q [n, k] float32 of a tile's active rows.

    Args:
        logits: [n, V_s], the tile.
        first: number of its first row.
        active: [R] bool; other rows of q are garbage.
        lse: [n] float32, of the logits / τ.
        columns: K.
        table: W by teacher column.
        weight: [entries of W] float32, in the order of `table`.
        touched: the student's columns that matter.
        rows_per_set: T.
        temperature: τ.
    """
    n, (sets, width), room = logits.shape[0], columns.index.shape, touched.token.shape[1]
    mass = torch.empty(n, width, device=logits.device)
    programs = min(ceil_div(n, ROWS), PROGRAMS)
    probabilities = torch.empty(programs, touched.limit, ROWS, device=logits.device)
    at = touched.rank.index_select(1, table.student)  # one more than an entry's place in the list; only those of K are read
    launch(
        _project_kernel, (programs,), logits, logits.stride(0), first, n, active, lse, mass, width, columns.start, columns.count,
        columns.heavy, at, at.shape[1], weight, touched.token, touched.count, room, touched.limit, probabilities, rows_per_set, sets, 1.0 / temperature,
        ROWS=ROWS, FEW=1024, LIGHT=1024, COLUMNS=16, ENTRIES=64, num_warps=WARPS,
    )  # fmt: skip
    return mass


@triton.jit
def _mean_mass(mass, width, tile, row_chunk, chunk, first, last, count, j, inside):
    """Q of a chunk at positions j: the mean of q over its rows."""
    total = tl.zeros(j.shape, tl.float32)
    for row in range(first, last + 1):
        if tl.load(row_chunk + row) == chunk:
            total += tl.load(mass + (tl.cast(row, tl.int64) - tile) * width + j, mask=inside, other=0.0)
    return total / count


@triton.jit
def _renormalised(mass, scale, r, REVERSE: tl.constexpr, FIRST: tl.constexpr, EPSILON: tl.constexpr, FLOOR: tl.constexpr):
    """Normalised Q, each column's term of the KL and the term's derivative by normalised Q. `first` floors the log, `mean` adds an epsilon."""
    q = mass * scale
    if FIRST:
        floored = tl.maximum(q, FLOOR)
        passes = q >= FLOOR
    else:
        floored = q + EPSILON
        passes = q >= 0
    log_q = tl.log(floored)
    if REVERSE:
        term = floored * (log_q - r)
        slope = log_q - r + 1.0
    else:
        target = tl.exp(r)
        term = target * (r - log_q)
        slope = -target / floored
    return q, term, tl.where(passes, slope, 0.0)


@triton.jit
def _chunk_kl_kernel(
    mass, width, tile, num_rows, row_chunk, firsts, lasts, counts, within, within_lse, teacher_tile, t_row_chunk, t_firsts, t_lasts, inv_tau,
    kl, owner, share, slope, REVERSE: tl.constexpr, FIRST: tl.constexpr, EPSILON: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a chunk of the tile: its KL, then G in place of q of its first row (the owner), and every row's share and slope."""
    chunk = tl.program_id(0)
    first, last, count = tl.load(firsts + chunk), tl.load(lasts + chunk), tl.load(counts + chunk)
    if count == 0:
        tl.store(kl + chunk, 0.0)
    head = first.to(tl.int64) - tile
    if (count > 0) & (head >= 0) & (head < num_rows):
        t_first, t_last = tl.load(t_firsts + chunk), tl.load(t_lasts + chunk)
        total = tl.zeros([BLOCK], tl.float32)
        for j0 in range(0, width, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            total += _mean_mass(mass, width, tile, row_chunk, chunk, first, last, count, j, j < width)
        captured = tl.sum(total, 0)
        if FIRST:
            scale = 1.0 / tl.maximum(captured, FLOOR)
        else:
            scale = 1.0 / (captured + EPSILON)

        terms = tl.zeros([BLOCK], tl.float32)
        inner = tl.zeros([BLOCK], tl.float32)
        for j0 in range(0, width, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            inside = j < width
            chunk_mass = _mean_mass(mass, width, tile, row_chunk, chunk, first, last, count, j, inside)
            r = mean_log_prob(within, width, teacher_tile, within_lse, t_row_chunk, chunk, t_first, t_last, j, inside, inv_tau)
            q, term, by_q = _renormalised(chunk_mass, scale, r, REVERSE, FIRST, EPSILON, FLOOR)
            terms += tl.where(inside, term, 0.0)
            inner += tl.where(inside, by_q * q, 0.0)
        tl.store(kl + chunk, tl.sum(terms, 0))
        pull = tl.sum(inner, 0)
        if FIRST:
            pull = tl.where(captured >= FLOOR, pull, 0.0)

        part = 1.0 / count
        for step in range(first + 1, last + 2):  # the first row comes last: G takes the place of its q
            row = tl.where(step == last + 1, first, step)
            local = row.to(tl.int64) - tile
            mine = tl.load(row_chunk + row) == chunk
            dot = tl.zeros([BLOCK], tl.float32)
            for j0 in range(0, tl.where(mine, width, 0), BLOCK):
                j = j0 + tl.arange(0, BLOCK)
                inside = j < width
                chunk_mass = _mean_mass(mass, width, tile, row_chunk, chunk, first, last, count, j, inside)
                r = mean_log_prob(
                    within, width, teacher_tile, within_lse, t_row_chunk, chunk, t_first, t_last, j, inside, inv_tau
                )
                q, term, by_q = _renormalised(chunk_mass, scale, r, REVERSE, FIRST, EPSILON, FLOOR)
                g = (by_q - pull) * scale
                dot += tl.where(inside, g * tl.load(mass + local * width + j, mask=inside, other=0.0), 0.0)
                tl.store(mass + local * width + j, g, mask=inside & (step == last + 1))
            if mine:
                tl.store(owner + local, head.to(tl.int32))
                tl.store(share + local, part)
                tl.store(slope + local, -part * tl.sum(dot, 0))


@dataclass(frozen=True)
class SparseGradient:
    """One teacher's part of the gradient of a tile's n student rows, in a form that `gradient.py` spreads over the vocabulary."""

    values: Tensor
    """[n, k] float32: G (p_kl) or the derivative by the logits within K (same vocabulary), by owner row."""
    owner: Tensor
    """[n] int32: the row whose values are this row's."""
    share: Tensor
    """[n] float32: their factor."""
    slope: Tensor
    """[n] float32: factor of the dense part, p itself."""
    active: Tensor
    """[n] bool: rows that have all this; the others hold garbage."""

    @classmethod
    def over(cls, values: Tensor, active: Tensor) -> SparseGradient:
        """Room for it."""
        n, device = values.shape[0], values.device
        share, slope = torch.empty(2, n, device=device).unbind()
        return cls(values, torch.empty(n, dtype=torch.int32, device=device), share, slope, active)


def chunk_kl(
    mass: Tensor, student: Rows, first: int, within: Tensor, within_lse: Tensor, teacher: Rows, teacher_first: int, kl: Tensor,
    temperature: float, reverse: bool, first_only: bool,
) -> SparseGradient:  # fmt: skip
    """KL of the chunks whose rows are in the tile, and their gradient. Uses up `mass`.

    Args:
        mass: [n, k] q of the tile's rows.
        student: student rows of all chunks.
        first: number of the tile's first row.
        within: [m, k] teacher logits within K.
        within_lse: [m] their log-sum-exp / τ.
        teacher: their teacher rows.
        teacher_first: number of the first row of `within`.
        kl: [N] float32; written for the tile's chunks.
        temperature: τ.
        reverse: KL(student || teacher).
        first_only: chunk_distribution: first.
    """
    sparse = SparseGradient.over(mass, student.active[first : first + mass.shape[0]])
    chunks = kl.shape[0]
    if chunks:
        launch(
            _chunk_kl_kernel, (chunks,), mass, mass.shape[1], first, mass.shape[0], student.chunk, student.first, student.last, student.count,
            within, within_lse, teacher_first, teacher.chunk, teacher.first, teacher.last, 1.0 / temperature, kl, sparse.owner, sparse.share,
            sparse.slope, REVERSE=reverse, FIRST=first_only, EPSILON=EPSILON, FLOOR=FLOOR, BLOCK=2048, num_warps=8,
        )  # fmt: skip
    return sparse


@triton.jit
def _weight_gradient_kernel(
    logits, stride, first, num_rows, lse, values, active, owner, share, width, token, count, number, position, slot, partial, vocab, room, rows_per_set,
    num_sets, inv_tau, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    logits: Tensor, first: int, lse: Tensor, sparse: SparseGradient, touched: Touched, placed: Placed, rows_per_set: int, temperature: float
) -> Tensor:  # fmt: skip
    """[V_s, slots] float32: the derivative by W's weights of the sum of the tile's KLs (not yet times τ² and the coefficient)."""
    n, vocab = logits.shape
    sets, slots, _ = placed.position.shape
    parts, block = min(16, max(1, n // 64)), 128
    partial = torch.zeros(parts, sets, vocab, slots, device=logits.device)
    launch(
        _weight_gradient_kernel, (ceil_div(vocab, block), sets, parts),
        logits, logits.stride(0), first, n, lse, sparse.values, sparse.active, sparse.owner, sparse.share, sparse.values.shape[1], touched.token,
        touched.count, placed.number, placed.position, placed.slot, partial, vocab, touched.token.shape[1], rows_per_set, sets, 1.0 / temperature,
        SLOTS=slots, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return partial.sum((0, 1))
