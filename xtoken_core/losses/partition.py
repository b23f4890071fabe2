"""partition_kl: what it compares, the comparison itself, and the whole in plain PyTorch with autograd. Formulas: `reference.partition_kl`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken_core.losses.selection import FLOOR, chunk_rows, next_token_ids
from xtoken_core.losses.types import TeacherBatch
from xtoken_core.spec import LossSpec

LARGEST_LOG_SHARE = -1e-6
"""The log of a realised chunk's share of its cell is kept below this, so that the log of the rest stays finite."""


@dataclass(frozen=True)
class ComparedChunks:
    """What partition_kl compares of one batch. All flat: rows are b * T + t; n valid chunks in their order."""

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


def compared_chunks(teacher: TeacherBatch, student_ids: Tensor, sample_mask: Tensor, spec: LossSpec) -> ComparedChunks:
    """The valid chunks of a batch: those whose first token is predicted on both sides."""
    assert teacher.projection is not None and teacher.projection.cells is not None
    assert teacher.input_ids is not None and teacher.chunk_exact is not None
    cells = teacher.projection.cells
    first = chunk_rows(teacher, sample_mask, spec.model_copy(update={"chunk_distribution": "first"}))
    every = chunk_rows(teacher, sample_mask, spec.model_copy(update={"chunk_distribution": "mean"}))
    chunks = first.valid.nonzero().squeeze(1)
    student_row, teacher_row = ((rows >= 0).nonzero().squeeze(1) for rows in (first.student, first.teacher))
    cell = cells.student[next_token_ids(student_ids).flatten()[student_row]]
    same = cell == cells.teacher[next_token_ids(teacher.input_ids).flatten()[teacher_row]]
    several = (every.student_size > 1) | (every.teacher_size > 1)
    realised = (several & teacher.chunk_exact.bool().flatten())[chunks] & same & (cell >= 0)
    count = len(chunks)
    number = torch.full((first.valid.numel() + 1,), count, device=chunks.device)  # the last for rows without a chunk, -1
    number[chunks[realised]] = realised.nonzero().squeeze(1)
    return ComparedChunks(
        student_row, teacher_row, number[every.student], number[every.teacher], torch.where(realised, cell, 0), realised
    )


def partition_kl(log_probs: Tensor, logits: Tensor, student_ids: Tensor, teacher: TeacherBatch, chunks: ComparedChunks, spec: LossSpec) -> Tensor:
    """Sum over a batch's valid chunks of partition_kl, τ² within.

    Args:
        log_probs: [B, T_s, V_s] of the student, at τ = 1.
        logits: [B, T_t, V_t] of the teacher.
        student_ids: [B, T_s].
        teacher: its ids are read, and the cells of its projection.
        chunks: `compared_chunks` of the batch.
        spec: read for temperature and reverse_kl.
    """
    assert teacher.projection is not None and teacher.projection.cells is not None and teacher.input_ids is not None
    cells = teacher.projection.cells
    student, other = log_probs.flatten(0, 1), logits.detach().log_softmax(-1).flatten(0, 1)
    sides = [
        Side(cell_masses(rows[first], table, cells.num_cells), rows.gather(1, next_token_ids(ids).reshape(-1, 1))[:, 0], chunk)
        for rows, first, table, ids, chunk in (
            (student, chunks.student_row, cells.student, student_ids, chunks.student_chunk),
            (other, chunks.teacher_row, cells.teacher, teacher.input_ids, chunks.teacher_chunk),
        )
    ]
    return compare(*sides, chunks.cell, chunks.realised, spec)


def cell_masses(log_probs: Tensor, cells: Tensor, count: int) -> Tensor:
    """[n, V] log-probabilities -> [count, n] log-probabilities of the cells; less than FLOOR counts as FLOOR."""
    inside = (cells >= 0).nonzero().squeeze(1)
    mass = log_probs.new_zeros(count, len(log_probs)).index_add(0, cells[inside], log_probs.exp().T[inside])
    return mass.clamp(min=FLOOR).log()


@dataclass(frozen=True)
class Side:
    """One side of the comparison of n chunks."""

    cells: Tensor
    """[cells, n]: log-probabilities of the cells of the first token, at τ = 1; they need not sum to one."""
    tokens: Tensor
    """[rows]: log-probability of the token that each row predicts."""
    chunk: Tensor
    """[rows] int64: its realised chunk, 0..n-1; n: none."""

    def chunk_log_probs(self) -> Tensor:
        """[n]: log-probability of each realised chunk."""
        count = self.cells.shape[1]
        return self.tokens.new_zeros(count + 1).index_add(0, self.chunk, self.tokens)[:count]


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

    s_share, t_share = (_log_share(side, cell, realised) for side in (student, teacher))
    target_side, target_share, other_share = (student, s_share, t_share) if spec.reverse_kl else (teacher, t_share, s_share)
    mass = (target_side.cells.gather(0, cell[None])[0] - target_side.cells.logsumexp(0)).exp()
    rest = (1 - target_share.exp()) * (_log1mexp(target_share) - _log1mexp(other_share))
    second = mass * (target_share.exp() * (target_share - other_share) + rest)
    return spec.temperature**2 * first + second[realised].sum()


def _log_share(side: Side, cell: Tensor, realised: Tensor) -> Tensor:
    """[n]: the log of the realised chunk's share of its cell's mass; a half where there is none."""
    of_cell = side.cells.gather(0, cell[None])[0]
    share = (side.chunk_log_probs() - of_cell).clamp(max=LARGEST_LOG_SHARE)
    return torch.where(realised, share, math.log(0.5))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends."""
    near = x > -math.log(2)
    return torch.where(
        near, torch.where(near, x, -1.0).expm1().neg().log(), torch.log1p(-torch.where(near, -1.0, x).exp())
    )
