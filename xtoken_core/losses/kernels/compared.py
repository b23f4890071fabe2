"""Which rows partition_kl compares, in one small kernel: the same as `partition.compared_chunks`, by the student's rows, whose number is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.chunks import Rows, chunk_rows
from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.partition import cells_of
from xtoken_core.losses.types import StudentBatch, TeacherBatch
from xtoken_core.spec import LossSpec

_BLOCK = 256


class Compared(NamedTuple):
    """What is compared, by rows of the student."""

    partner: Tensor
    """[R] int32: of a row that predicts the first token of a valid chunk, the teacher's row that does; -1 elsewhere."""
    cell: Tensor
    """[R] int32: of such a row of a realised chunk, the cell that the chunk is a part of; -1 elsewhere."""
    owner: Tensor
    """[R] int32: of a row that predicts any token of a realised chunk, the row of its first token; -1 elsewhere."""
    further: Tensor
    """[R_t] bool: the teacher's rows that predict another token of a chunk than such a first one."""
    student: Rows
    """The rows of every chunk that keeps some on both sides."""
    teacher: Rows

    def teacher_order(self, first: int, last: int, begin: int, end: int, columns: int) -> Tensor:
        """[columns] int64: the teacher's rows begin..end-1 beside the student's first..last-1, each partner in the column of its row.

        The other columns take the further rows in turn, and when there are no more of them, `end`.
        """
        partner = torch.nn.functional.pad(self.partner[first:last], (0, columns - (last - first)), value=-1)
        further = torch.nonzero_static(self.further[begin:end], size=columns, fill_value=end - begin)[:, 0] + begin
        free = partner < 0
        return torch.where(free, further[free.cumsum(0) - 1], partner)


@triton.jit
def _pair_kernel(
    student, teacher, student_chunks, teacher_chunks, student_ids, teacher_ids, student_cells, teacher_cells, exact, partner, cell, owner, further,
    student_length, teacher_length, per_row, rows, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk that a sample begins with, on either side, has a first token that no row predicts."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.load(student.chunk + row, mask=row < rows, other=-1)
    valid = chunk >= 0
    sample, local = chunk // per_row, chunk % per_row
    begins = tl.load(student_chunks + sample * student_length, mask=valid, other=-1) == local
    begins = begins | (tl.load(teacher_chunks + sample * teacher_length, mask=valid, other=-1) == local)
    valid = valid & (begins == 0)
    first = tl.load(student.first + chunk, mask=valid, other=0)
    theirs = tl.load(teacher.first + chunk, mask=valid, other=0)
    own_cell = tl.load(student_cells + tl.load(student_ids + first + 1, mask=valid, other=0), mask=valid, other=-1)
    their_cell = tl.load(teacher_cells + tl.load(teacher_ids + theirs + 1, mask=valid, other=0), mask=valid, other=-1)
    size = tl.maximum(tl.load(student.size + chunk, mask=valid, other=0), tl.load(teacher.size + chunk, mask=valid, other=0))
    realised = valid & (own_cell >= 0) & (own_cell == their_cell) & (size > 1)
    realised = realised & (tl.load(exact + chunk, mask=valid, other=0) != 0)
    here = row == first
    tl.store(partner + row, tl.where(valid & here, theirs, -1), mask=row < rows)
    tl.store(cell + row, tl.where(realised & here, own_cell, -1).to(tl.int32), mask=row < rows)
    tl.store(owner + row, tl.where(realised, first, -1), mask=row < rows)
    tl.store(further + theirs, False, mask=valid & here)


def compared_rows(student: StudentBatch, teacher: TeacherBatch, spec: LossSpec) -> Compared:
    """Of a batch. The host waits for nothing."""
    assert teacher.student_chunk_id is not None and teacher.teacher_chunk_id is not None
    assert teacher.input_ids is not None and teacher.chunk_exact is not None
    cells = cells_of(teacher)
    own, theirs = chunk_rows(teacher, student.sample_mask, spec.model_copy(update={"chunk_distribution": "mean"}))
    rows = student.input_ids.numel()
    further = theirs.active.clone()
    partner, cell, owner = torch.empty(3, rows, dtype=torch.int32, device=student.input_ids.device)
    launch(
        _pair_kernel, (ceil_div(rows, _BLOCK),), own, theirs, teacher.student_chunk_id.contiguous(), teacher.teacher_chunk_id.contiguous(),
        student.input_ids.contiguous(), teacher.input_ids.contiguous(), cells.student, cells.teacher, teacher.chunk_exact.contiguous(),
        partner, cell, owner, further, student.input_ids.shape[1], teacher.input_ids.shape[1], max(1, teacher.chunk_exact.shape[1]), rows,
        BLOCK=_BLOCK,
    )  # fmt: skip
    return Compared(partner, cell, owner, further, own, theirs)
