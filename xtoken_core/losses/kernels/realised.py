"""partition_kl by column: the realised part with its derivative, and the sums.

With a and b the logs of the shares of its cell that a realised chunk has by the student and the teacher, and M the teacher's mass of that cell,

    M (e^b (b - a) + (1 - e^b) (log(1 - e^b) - log(1 - e^a)))        its derivative by a: M ((1 - e^b) e^a / (1 - e^a) - e^b)

In float64, where both logarithms are exact enough as they stand; there are few columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.cell_masses import LEAST, SPLITS, CellSide, Masses, largest_rest, log_masses
from xtoken_core.losses.kernels.chunks import Rows
from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.partition import LARGEST_LOG_SHARE

_BLOCK = 32
LOG_2 = tl.constexpr(math.log(2))


class Columns(NamedTuple):
    """The student's columns of a tile: the rows first, first + 1, ... of the batch, `size` of them. What is of rows begins at the first."""

    partner: Tensor
    """[size] int32: the teacher's row, whose masses are in the same column; -1: none. See `Compared`."""
    cell: Tensor
    """[size] int32."""
    owner: Tensor
    """[size] int32."""
    counted: Tensor
    """[size] bool: with cross-entropy."""
    following: Tensor
    """[size] int64: the tokens that the rows predict."""
    first: int
    size: int


class Teacher(NamedTuple):
    """The teacher's side of a tile."""

    masses: Masses
    tokens: Tensor
    """Log-probability of the token that each of its rows predicts, from the row `first` on."""
    first: int
    rows: Rows


class Slopes(NamedTuple):
    """Derivatives of partition_kl, by column, float32."""

    chunk: Tensor
    """By the log-probability of every token of the realised chunk that begins here."""
    cell: Tensor
    """By the log of the mass of its cell."""
    rest: Tensor
    """The sum of those by the logs of all masses, and by the log of their sum, unless that is at the floor."""


@triton.jit
def _chunk_log_prob(rows, tokens, tile, chunk, use):
    """Σ over the rows of chunks."""
    first, last = tl.load(rows.first + chunk, mask=use, other=0), tl.load(rows.last + chunk, mask=use, other=-1)
    total = tl.zeros(chunk.shape, tl.float64)
    for k in range(tl.max(last - first, 0) + 1):
        row = first + k
        inside = use & (row <= last)
        inside = inside & (tl.load(rows.chunk + row, mask=inside, other=-1) == chunk)
        total += tl.load(tokens + row - tile, mask=inside, other=0.0).to(tl.float64)
    return total


@triton.jit
def _log_mass(side, cell, column, use, LEAST: tl.constexpr):
    at = tl.load(side.at + cell, mask=use, other=0)
    return log_masses(side, at, column, tl.load(side.top + column), tl.load(side.over + column), use, LEAST)


@triton.jit
def _sum_splits(parts, column, columns, SPLITS: tl.constexpr):
    at = tl.arange(0, SPLITS)[:, None] * columns + column[None, :]
    return tl.sum(tl.load(parts + at).to(tl.float64), 0)


@triton.jit
def _realised_kernel(
    own, rows, tokens, argmax, teacher, columns, kl, floored, terms, slopes, limit,
    LARGEST: tl.constexpr, LEAST: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """terms [3, columns] float64: partition_kl, cross-entropy, whether the predicted token is the argmax."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns.size
    partner = tl.load(columns.partner + column, mask=inside, other=-1)
    cell = tl.load(columns.cell + column, mask=inside, other=-1)
    use = cell >= 0
    chunk = tl.load(rows.chunk + columns.first + column, mask=use, other=0)
    other = teacher.masses
    s = _log_mass(own, cell, column, use, LEAST)
    t = _log_mass(other, cell, column, use, LEAST)
    share = _chunk_log_prob(rows, tokens, columns.first, chunk, use) - s.to(tl.float64) * LOG_2
    a = tl.where(use, tl.minimum(share, LARGEST), -1.0)
    b = _chunk_log_prob(teacher.rows, teacher.tokens, teacher.first, chunk, use) - t.to(tl.float64) * LOG_2
    b = tl.where(use, tl.minimum(b, LARGEST), -1.0)
    mass = tl.where(use, tl.exp2((t + tl.load(other.rest + column)).to(tl.float64)), 0.0)
    p, q = tl.exp(a), tl.exp(b)
    value = mass * (q * (b - a) + (1.0 - q) * (tl.log(1.0 - q) - tl.log(1.0 - p)))
    slope = tl.where(share <= LARGEST, mass * ((1.0 - q) * p / (1.0 - p) - q), 0.0)
    by_cell = tl.where(s > LEAST, -slope, 0.0)
    still = _sum_splits(floored, column, own.columns, SPLITS) - (tl.load(own.rest + column) >= limit).to(tl.float64)
    still = tl.where(partner >= 0, still, 0.0)
    tl.store(slopes.chunk + column, slope.to(tl.float32))
    tl.store(slopes.cell + column, by_cell.to(tl.float32))
    tl.store(slopes.rest + column, (by_cell + still).to(tl.float32))
    first = tl.where(partner >= 0, LOG_2 * _sum_splits(kl, column, own.columns, SPLITS), 0.0)
    counts = tl.load(columns.counted + column, mask=inside, other=0) != 0
    tl.store(terms + column, first + value)
    tl.store(terms + own.columns + column, tl.where(counts, -tl.load(tokens + column).to(tl.float64), 0.0))
    right = counts & (tl.load(argmax + column) == tl.load(columns.following + column, mask=inside, other=-1))
    tl.store(terms + 2 * own.columns + column, right.to(tl.float64))


def realised_part(
    own: CellSide, rows: Rows, teacher: Teacher, columns: Columns, kl: Tensor, floored: Tensor
) -> tuple[Tensor, Slopes]:
    """[3] float64 sums over a tile, as of `partition.run`, and derivatives.

    Args:
        own: the student's side; `rows`: of its chunks.
        teacher: the teacher's.
        columns: the tile's.
        kl: [SPLITS, columns] float32, parts of the KL of cells, in bits.
        floored: likewise, of the derivative by all masses that the floor leaves.
    """
    count, device = own.masses.columns, kl.device
    terms = torch.empty(3, count, dtype=torch.float64, device=device)
    slopes = Slopes(*torch.empty(3, count, device=device))
    launch(
        _realised_kernel, (ceil_div(count, _BLOCK),), own.masses, rows, own.tokens, own.argmax, teacher, columns, kl, floored, terms, slopes,
        largest_rest(len(own.masses.at)), LARGEST=LARGEST_LOG_SHARE, LEAST=LEAST, SPLITS=SPLITS, BLOCK=_BLOCK,
    )  # fmt: skip
    return terms.sum(1), slopes
