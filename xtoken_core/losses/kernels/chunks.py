"""Which rows belong to which chunk, in a few small kernels: first, last and number of each chunk's predictor rows on both sides.

The same as `selection.chunk_rows`, whose `valid_chunks` decides here too. A chunk's rows are those between its first and its last that carry its
number, so they may lie in any order. Counters and extremes are integers: atomics do not make them depend on order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses import selection
from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.types import TeacherBatch
from xtoken_core.spec import LossSpec

_FAR = tl.constexpr(1 << 30)
_BLOCK = 512


class Rows(NamedTuple):
    """One side's predictor rows."""

    chunk: Tensor
    """[R] int32, by row: its valid chunk, or -1."""
    active: Tensor
    """[R] bool, by row: it has one."""
    first: Tensor
    """[N] int32, by chunk: its first row."""
    last: Tensor
    """[N] int32, by chunk: its last row; below `first` where the chunk is not valid."""
    size: Tensor
    """[N] int32, by chunk: its rows; 0 where it is not valid."""


class Side(NamedTuple):
    """One side of a tile as kernels take it: its logits, and the rows of all chunks."""

    logits: Tensor
    """[n, V]."""
    stride: int
    """Of a row of logits."""
    tile: int
    """Number of the first row of the logits."""
    lse: Tensor
    """[n] float32: log-sum-exp of the logits / τ."""
    chunk: Tensor
    first: Tensor
    last: Tensor
    size: Tensor

    @classmethod
    def of(cls, logits: Tensor, first: int, lse: Tensor, rows: Rows) -> Side:
        """`first`: number of the first row."""
        return cls(logits, logits.stride(0) if logits.ndim == 2 else 0, first, lse, rows.chunk, rows.first, rows.last, rows.size)


@triton.jit
def _extent_kernel(
    s_ids, t_ids, extents, s_length, t_length, s_rows, t_rows, chunks, per_row, FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    """Of every chunk and each side, over its tokens that have a predictor row (FIRST: over all): FAR - lowest position, highest + 1, number."""
    if tl.program_id(1) == 0:
        _extend(s_ids, extents, s_length, s_rows, chunks, per_row, FIRST, BLOCK)
    else:
        _extend(t_ids, extents + 3 * chunks, t_length, t_rows, chunks, per_row, FIRST, BLOCK)


@triton.jit
def _extend(ids, extents, length, rows, chunks, per_row, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.load(ids + position, mask=position < rows, other=-1).to(tl.int32)
    use = (chunk >= 0) & (chunk < per_row)
    if not FIRST:
        use = use & (position % length > 0)
    chunk += position // length * per_row
    tl.atomic_max(extents + chunk, -position + _FAR, mask=use, sem="relaxed")
    tl.atomic_max(extents + chunks + chunk, position + 1, mask=use, sem="relaxed")
    tl.atomic_add(extents + 2 * chunks + chunk, 1, mask=use, sem="relaxed")


@triton.jit
def _side(extents, chunks, chunk, inside, length, FIRST: tl.constexpr):
    """First and last predictor row of chunks, and how many."""
    first = -tl.load(extents + chunk, mask=inside, other=0) + _FAR - 1
    last = tl.load(extents + chunks + chunk, mask=inside, other=0) - 2
    count = tl.load(extents + 2 * chunks + chunk, mask=inside, other=0)
    if FIRST:
        last = first
        count = tl.where((count > 0) & ((first + 1) % length > 0), 1, 0)
    return first, last, count


@triton.jit
def _size_kernel(extents, sizes, chunks, student_length, teacher_length, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """How many predictor rows each chunk has on either side."""
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = chunk < chunks
    _, _, student = _side(extents, chunks, chunk, inside, student_length, FIRST)
    _, _, teacher = _side(extents + 3 * chunks, chunks, chunk, inside, teacher_length, FIRST)
    tl.store(sizes + chunk, student, mask=inside)
    tl.store(sizes + chunks + chunk, teacher, mask=inside)


@triton.jit
def _valid_kernel(valid, extents, chunks, student_length, teacher_length, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Turns extents into rows, and empties the chunks that are not valid."""
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = chunk < chunks
    live = tl.load(valid + chunk, mask=inside, other=0) != 0
    student = extents
    teacher = extents + 3 * chunks
    first, last, count = _side(student, chunks, chunk, inside, student_length, FIRST)
    t_first, t_last, t_count = _side(teacher, chunks, chunk, inside, teacher_length, FIRST)
    tl.store(student + chunk, tl.where(live, first, 0), mask=inside)
    tl.store(student + chunks + chunk, tl.where(live, last, -1), mask=inside)
    tl.store(student + 2 * chunks + chunk, tl.where(live, count, 0), mask=inside)
    tl.store(teacher + chunk, tl.where(live, t_first, 0), mask=inside)
    tl.store(teacher + chunks + chunk, tl.where(live, t_last, -1), mask=inside)
    tl.store(teacher + 2 * chunks + chunk, tl.where(live, t_count, 0), mask=inside)


@triton.jit
def _row_chunk_kernel(
    s_ids,
    t_ids,
    extents,
    s_chunk,
    t_chunk,
    s_active,
    t_active,
    s_length,
    t_length,
    s_rows,
    t_rows,
    chunks,
    per_row,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The valid chunk of the token that each row of each side predicts."""
    if tl.program_id(1) == 0:
        _look_up(s_ids, extents, s_chunk, s_active, s_length, s_rows, chunks, per_row, FIRST, BLOCK)
    else:
        _look_up(t_ids, extents + 3 * chunks, t_chunk, t_active, t_length, t_rows, chunks, per_row, FIRST, BLOCK)


@triton.jit
def _look_up(ids, extents, row_chunk, active, length, rows, chunks, per_row, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inner = (row < rows) & (row % length < length - 1)
    chunk = tl.load(ids + row + 1, mask=inner, other=-1).to(tl.int32)
    inner = inner & (chunk >= 0) & (chunk < per_row)
    chunk += row // length * per_row
    live = inner & (tl.load(extents + 2 * chunks + chunk, mask=inner, other=0) > 0)
    if FIRST:
        live = live & (tl.load(extents + chunk, mask=inner, other=-1) == row)
    tl.store(row_chunk + row, tl.where(live, chunk, -1), mask=row < rows)
    tl.store(active + row, live, mask=row < rows)


def _extents(teacher: TeacherBatch, sample_mask: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """[2 sides, 3, N] int32, what `_side` reads, and [N] bool: which chunks are valid."""
    assert teacher.student_chunk_id is not None and teacher.teacher_chunk_id is not None and teacher.chunk_valid is not None
    first = spec.chunk_distribution == "first"
    chunks, per_row = teacher.chunk_valid.numel(), teacher.chunk_valid.shape[1]
    extents = torch.zeros(2, 3, chunks, dtype=torch.int32, device=sample_mask.device)
    sizes = torch.zeros(2, chunks, dtype=torch.int32, device=sample_mask.device)
    student, theirs = teacher.student_chunk_id.contiguous(), teacher.teacher_chunk_id.contiguous()
    if chunks:
        launch(
            _extent_kernel,
            (ceil_div(max(student.numel(), theirs.numel()), _BLOCK), 2),
            student,
            theirs,
            extents,
            student.shape[1],
            theirs.shape[1],
            student.numel(),
            theirs.numel(),
            chunks,
            per_row,
            FIRST=first,
            BLOCK=_BLOCK,
        )
        blocks = (ceil_div(chunks, _BLOCK),)
        lengths = student.shape[1], theirs.shape[1]
        launch(_size_kernel, blocks, extents, sizes, chunks, *lengths, FIRST=first, BLOCK=_BLOCK)
    return extents, selection.valid_chunks(teacher, sample_mask, sizes[0], sizes[1], spec)


def valid_chunks(teacher: TeacherBatch, sample_mask: Tensor, spec: LossSpec) -> Tensor:
    """0-dim int64: how many chunks are valid."""
    return torch.count_nonzero(_extents(teacher, sample_mask, spec)[1])


def chunk_rows(teacher: TeacherBatch, sample_mask: Tensor, spec: LossSpec) -> tuple[Rows, Rows]:
    """The student's and the teacher's rows of every chunk."""
    extents, valid = _extents(teacher, sample_mask, spec)
    assert teacher.student_chunk_id is not None and teacher.teacher_chunk_id is not None and teacher.chunk_valid is not None
    student, theirs = teacher.student_chunk_id.contiguous(), teacher.teacher_chunk_id.contiguous()
    sizes, lengths = (student.numel(), theirs.numel()), (student.shape[1], theirs.shape[1])
    first, chunks = spec.chunk_distribution == "first", valid.numel()
    chunk = [torch.empty(n, dtype=torch.int32, device=extents.device) for n in sizes]
    active = [torch.empty(n, dtype=torch.bool, device=extents.device) for n in sizes]
    if chunks:
        launch(_valid_kernel, (ceil_div(chunks, _BLOCK),), valid, extents, chunks, *lengths, FIRST=first, BLOCK=_BLOCK)
    launch(
        _row_chunk_kernel,
        (ceil_div(max(sizes), _BLOCK), 2),
        student,
        theirs,
        extents,
        *chunk,
        *active,
        *lengths,
        *sizes,
        chunks,
        teacher.chunk_valid.shape[1],
        FIRST=first,
        BLOCK=_BLOCK,
    )
    by_chunk = extents.view(6, -1).unbind()
    return Rows(chunk[0], active[0], *by_chunk[:3]), Rows(chunk[1], active[1], *by_chunk[3:])


@triton.jit
def mean_log_prob(side, chunk, first, last, column, mask, inv_tau):
    """At `column`s, the mean of logits / τ - lse over the rows first .. last of a chunk.

    Logits are summed before their log-sum-exps are taken off: equal sums stay equal.
    """
    total = tl.zeros(column.shape, tl.float32)
    norm = tl.zeros([], tl.float32)
    count = tl.zeros([], tl.float32)
    for row in range(first, last + 1):
        if tl.load(side.chunk + row) == chunk:
            local = tl.cast(row, tl.int64) - side.tile
            total += tl.load(side.logits + local * side.stride + column, mask=mask, other=0.0).to(tl.float32)
            norm += tl.load(side.lse + local)
            count += 1.0
    return (total * inv_tau - norm) / count
