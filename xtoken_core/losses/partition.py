"""partition_kl: which chunks it compares, and the comparison itself. Formulas: `reference.partition_kl`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken_core.losses.selection import chunk_rows, next_token_ids
from xtoken_core.losses.types import StudentBatch, TeacherBatch
from xtoken_core.partition import Partition
from xtoken_core.projection import Projection
from xtoken_core.spec import LossSpec

LARGEST_LOG_SHARE = math.log1p(-1e-6)
"""The log of a realised chunk's share of its cell is kept below this, so that the log of the rest stays finite."""


def cells_of(teacher: TeacherBatch) -> Partition:
    """The cells of a teacher of mode partition_kl, which `resolve_teachers` has made sure of."""
    assert teacher.projection is not None and teacher.projection.cells is not None
    return teacher.projection.cells


@dataclass(frozen=True)
class CellOrder:
    """A vocabulary ordered by cell, tokens without one last."""

    ids: Tensor
    """[V] int64: the id at each place."""
    place: Tensor
    """[V] int64: the place of each id."""
    sizes: Tensor
    """[cells] int64: tokens of each cell."""
    cell: Tensor
    """[kept] int64: the cell at each place that has one."""


def cell_order(projection: Projection, side: str, vocab: int) -> CellOrder:
    """The order of the first `vocab` ids of the `student` or the `teacher`."""
    assert projection.cells is not None
    return order_by_cell(getattr(projection.cells, side)[:vocab], projection.cells.num_cells)


def order_by_cell(cells: Tensor, count: int) -> CellOrder:
    """The order of tokens by their cells [V], of which there are `count`."""
    key = torch.where(cells < 0, count, cells)
    ids = key.argsort(stable=True)
    sizes = torch.bincount(key, minlength=count + 1)[:count]
    return CellOrder(ids, ids.argsort(), sizes, key[ids][: int(sizes.sum())])


@dataclass(frozen=True)
class ComparedChunks:
    """What is compared of one batch. All flat: rows are b * T + t; n valid chunks in their order."""

    student_row: Tensor
    """[n] int64: the row that predicts each chunk's first token."""
    teacher_row: Tensor
    """[n] int64."""
    student_chunk: Tensor
    """[B * T_s] int64: the realised chunk, 0..n-1, of the token that each row predicts; n: none."""
    teacher_chunk: Tensor
    """[B * T_t] int64."""
    cell: Tensor
    """[n] int64: the cell of the first token; 0 where not `realised`."""
    realised: Tensor
    """[n] bool: the chunk is exact, not one token on both sides, and both its first tokens are of `cell`: it is a part of that cell."""


def compared_chunks(student: StudentBatch, teacher: TeacherBatch, spec: LossSpec) -> ComparedChunks:
    """The valid chunks of a batch: those whose first token is predicted on both sides. On a GPU the host waits once, for their number."""
    assert teacher.input_ids is not None and teacher.chunk_exact is not None
    cells = cells_of(teacher)
    first = chunk_rows(teacher, student.sample_mask, spec.model_copy(update={"chunk_distribution": "first"}))
    every = chunk_rows(teacher, student.sample_mask, spec.model_copy(update={"chunk_distribution": "mean"}))
    chunks = first.valid.nonzero().squeeze(1)
    student_row, teacher_row = (_row_of_chunk(rows, first.valid.numel())[chunks] for rows in (first.student, first.teacher))
    cell = cells.student[next_token_ids(student.input_ids).flatten()[student_row]]
    same = cell == cells.teacher[next_token_ids(teacher.input_ids).flatten()[teacher_row]]
    several = (every.student_size > 1) | (every.teacher_size > 1)
    realised = (several & teacher.chunk_exact.bool().flatten())[chunks] & same & (cell >= 0)
    count = len(chunks)
    number = torch.full((first.valid.numel() + 1,), count, device=chunks.device)  # the last for rows without a chunk, -1
    number[chunks] = torch.where(realised, torch.arange(count, device=chunks.device), count)
    return ComparedChunks(
        student_row, teacher_row, number[every.student], number[every.teacher], torch.where(realised, cell, 0), realised
    )


def _row_of_chunk(row_chunk: Tensor, count: int) -> Tensor:
    """[count + 1]: the one row of each chunk that has a row, from the chunk of each row, -1 for none; meaningless for other chunks."""
    rows = torch.arange(len(row_chunk), device=row_chunk.device)
    return torch.zeros(count + 1, dtype=torch.int64, device=row_chunk.device).index_put((row_chunk,), rows)


@dataclass(frozen=True)
class Side:
    """One side of the comparison of n chunks."""

    cells: Tensor
    """[cells, n]: log-probabilities of the cells of the first token, at τ = 1; they need not sum to one."""
    tokens: Tensor
    """[rows]: log-probability of the token that each row predicts."""
    chunk: Tensor
    """[rows] int64: its realised chunk, 0..n-1; n: none."""
    all_cells: Tensor | None = None
    """[n]: log-probability of all cells together; None: what `cells` sum to."""

    def total(self) -> Tensor:
        """[n]: log-probability of all cells together."""
        return self.cells.logsumexp(0) if self.all_cells is None else self.all_cells

    def chunk_log_probs(self) -> Tensor:
        """[n]: log-probability of each realised chunk."""
        count = self.cells.shape[1]
        return chunk_sums(self.tokens, self.chunk, count)


def chunk_sums(tokens: Tensor, chunk: Tensor, count: int) -> Tensor:
    """[count]: the sum of the rows of each chunk, in float64 on the way, where their order shows in no bit that is left."""
    return tokens.new_zeros(count + 1, dtype=torch.float64).index_add(0, chunk, tokens.double())[:count].to(tokens.dtype)


def compare(student: Side, teacher: Side, cell: Tensor, realised: Tensor, spec: LossSpec) -> Tensor:
    """Sum over n chunks of both parts of partition_kl, τ² within.

    Args:
        student: differentiable.
        teacher: without gradient.
        cell: [n] int64, the cell that a realised chunk is a part of.
        realised: [n] bool.
        spec: read for temperature and reverse_kl.
    """
    s, t = (side.cells / spec.temperature for side in (student, teacher))
    s, t = (x - x.logsumexp(0) for x in (s, t))  # log_softmax over the first dimension is ten times slower on GPUs
    target, other = (s, t) if spec.reverse_kl else (t, s)
    first = (target.exp() * (target - other)).sum()

    own, theirs = (side.cells.gather(0, cell[None])[0] for side in (student, teacher))
    of = student if spec.reverse_kl else teacher
    mass = of.cells.gather(0, cell[None])[0] - of.total()
    second = realised_part(student.chunk_log_probs() - own, teacher.chunk_log_probs() - theirs, mass, realised, spec.reverse_kl)
    return spec.temperature**2 * first + second


def realised_part(student: Tensor, teacher: Tensor, mass: Tensor, realised: Tensor, reverse: bool) -> Tensor:
    """Sum over the realised ones of n chunks of the KL between {this chunk, the rest of its cell} of both sides.

    Args:
        student: [n] the log of the chunk's share of its cell; meaningless where not `realised`.
        teacher: [n] likewise.
        mass: [n] the log of the cell's probability: the teacher's, with `reverse` the student's.
        realised: [n] bool.
        reverse: the KL of the student from the teacher.
    """
    s, t = (torch.where(realised, x.clamp(max=LARGEST_LOG_SHARE), math.log(0.5)) for x in (student, teacher))
    target, other = (s, t) if reverse else (t, s)
    rest = (1 - target.exp()) * (_log1mexp(target) - _log1mexp(other))
    return torch.where(realised, mass.exp() * (target.exp() * (target - other) + rest), 0).sum()


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends."""
    near = x > -math.log(2)
    return torch.where(near, torch.where(near, x, -1.0).expm1().neg().log(), torch.log1p(-torch.where(near, -1.0, x).exp()))
