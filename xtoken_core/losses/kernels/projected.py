"""p_kl: the KL of every chunk between the student's projected probabilities and the teacher's within K.

With p the student's softmax(z / τ), q_t = p_t W[:, K] is formed row by row (`project.py`); one program a chunk then takes the mean of its rows, both
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

from xtoken_core.losses.kernels.chunks import Rows, Side, mean_log_prob
from xtoken_core.losses.kernels.launch import launch
from xtoken_core.losses.selection import EPSILON, FLOOR
from xtoken_core.spec import LossSpec


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
    mass,
    width,
    tile,
    num_rows,
    student,
    teacher,
    inv_tau,
    kl,
    owner,
    share,
    slope,
    REVERSE: tl.constexpr,
    FIRST: tl.constexpr,
    EPSILON: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a chunk of the tile: its KL, then G in place of q of its first row (the owner), and every row's share and slope."""
    chunk = tl.program_id(0)
    first, last, count = tl.load(student.first + chunk), tl.load(student.last + chunk), tl.load(student.size + chunk)
    if count == 0:
        tl.store(kl + chunk, 0.0)
    head = first.to(tl.int64) - tile
    if (count > 0) & (head >= 0) & (head < num_rows):
        t_first, t_last = tl.load(teacher.first + chunk), tl.load(teacher.last + chunk)
        total = tl.zeros([BLOCK], tl.float32)
        for j0 in range(0, width, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            total += _mean_mass(mass, width, tile, student.chunk, chunk, first, last, count, j, j < width)
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
            chunk_mass = _mean_mass(mass, width, tile, student.chunk, chunk, first, last, count, j, inside)
            r = mean_log_prob(teacher, chunk, t_first, t_last, j, inside, inv_tau)
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
            mine = tl.load(student.chunk + row) == chunk
            dot = tl.zeros([BLOCK], tl.float32)
            for j0 in range(0, tl.where(mine, width, 0), BLOCK):
                j = j0 + tl.arange(0, BLOCK)
                inside = j < width
                chunk_mass = _mean_mass(mass, width, tile, student.chunk, chunk, first, last, count, j, inside)
                r = mean_log_prob(teacher, chunk, t_first, t_last, j, inside, inv_tau)
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


def chunk_kl(mass: Tensor, first: int, student: Rows, teacher: Side, kl: Tensor, spec: LossSpec) -> SparseGradient:
    """KL of the chunks whose rows are in the tile, and their gradient. Uses up `mass`.

    Args:
        mass: [n, k] q of the tile's rows.
        first: number of the tile's first row.
        student: student rows of all chunks.
        teacher: the teacher's tile, of logits [m, k] within K and their log-sum-exp / τ.
        kl: [N] float32; written for the tile's chunks.
        spec: read for `temperature`, `reverse_kl` and `chunk_distribution`.
    """
    sparse = SparseGradient.over(mass, student.active[first : first + mass.shape[0]])
    chunks = kl.shape[0]
    if chunks:
        launch(
            _chunk_kl_kernel,
            (chunks,),
            mass,
            mass.shape[1],
            first,
            mass.shape[0],
            student,
            teacher,
            1.0 / spec.temperature,
            kl,
            sparse.owner,
            sparse.share,
            sparse.slope,
            REVERSE=spec.reverse_kl,
            FIRST=spec.chunk_distribution == "first",
            EPSILON=EPSILON,
            FLOOR=FLOOR,
            BLOCK=2048,
            num_warps=8,
        )
    return sparse
