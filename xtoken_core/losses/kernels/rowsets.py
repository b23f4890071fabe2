"""Which rows belong to which chunk, in three small kernels: first, last and number of each chunk's predictor rows on both sides.

The same as `selection.chunk_rows`. A chunk's rows are those between its first and its last that carry its number, so they may lie in any order.
Counters and extremes are integers: atomics do not make them depend on order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.types import TeacherBatch
from xtoken_core.spec import LossSpec

_FAR = tl.constexpr(1 << 30)
_BLOCK = 512


@dataclass(frozen=True)
class Rows:
    """One side's predictor rows."""

    chunk: Tensor
    """[R] int32, by row: its valid chunk, or -1."""
    active: Tensor
    """[R] bool, by row: it has one."""
    first: Tensor
    """[N] int32, by chunk: its first row."""
    last: Tensor
    """[N] int32, by chunk: its last row; below `first` where the chunk is not valid."""
    count: Tensor
    """[N] int32, by chunk: its rows; 0 where it is not valid."""


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


def counted_rows(input_ids: Tensor, token_mask: Tensor, sample_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[R] bool rows that count, [R] int64 the tokens they predict, [R] bool rows whose own token is unmasked too: see `selection`."""
    rows = input_ids.numel()
    counted = torch.empty(rows, dtype=torch.bool, device=input_ids.device)
    targets = torch.empty(rows, dtype=torch.int64, device=input_ids.device)
    scope = torch.empty_like(counted)
    launch(
        _mark_counted_kernel, (ceil_div(rows, _BLOCK),),
        input_ids.contiguous(), token_mask.contiguous(), sample_mask.contiguous(), counted, targets, scope, input_ids.shape[1], rows,
        BLOCK=_BLOCK,
    )  # fmt: skip
    return counted, targets, scope


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
        _count_tokens_kernel, (1,), token_mask.contiguous(), sample_mask.contiguous(), out, token_mask.shape[1], token_mask.numel(),
        BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return out


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
def _valid_kernel(
    valid, exact, samples, extents, chunks, per_row, student_length, teacher_length, EXACT: tl.constexpr, FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns extents into rows, and empties the chunks that are not valid on both sides."""
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = chunk < chunks
    live = (tl.load(valid + chunk, mask=inside, other=0) != 0) & (tl.load(samples + chunk // per_row, mask=inside, other=0) != 0)
    if EXACT:
        live = live & (tl.load(exact + chunk, mask=inside, other=0) != 0)
    student = extents
    teacher = extents + 3 * chunks
    first, last, count = _side(student, chunks, chunk, inside, student_length, FIRST)
    t_first, t_last, t_count = _side(teacher, chunks, chunk, inside, teacher_length, FIRST)
    live = live & (count > 0) & (t_count > 0)
    tl.store(student + chunk, tl.where(live, first, 0), mask=inside)
    tl.store(student + chunks + chunk, tl.where(live, last, -1), mask=inside)
    tl.store(student + 2 * chunks + chunk, tl.where(live, count, 0), mask=inside)
    tl.store(teacher + chunk, tl.where(live, t_first, 0), mask=inside)
    tl.store(teacher + chunks + chunk, tl.where(live, t_last, -1), mask=inside)
    tl.store(teacher + 2 * chunks + chunk, tl.where(live, t_count, 0), mask=inside)


@triton.jit
def _row_chunk_kernel(
    s_ids, t_ids, extents, s_chunk, t_chunk, s_active, t_active, s_length, t_length, s_rows, t_rows, chunks, per_row, FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
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


def chunk_extents(teacher: TeacherBatch, sample_mask: Tensor, spec: LossSpec) -> Tensor:
    """[2 sides, 3, N] int32: first row, last row and number of rows of every chunk; see `Rows`."""
    assert teacher.student_chunk_id is not None and teacher.teacher_chunk_id is not None and teacher.chunk_valid is not None
    first = spec.chunk_distribution == "first"
    chunks, per_row = teacher.chunk_valid.numel(), teacher.chunk_valid.shape[1]
    extents = torch.zeros(2, 3, chunks, dtype=torch.int32, device=sample_mask.device)
    student, theirs = teacher.student_chunk_id.contiguous(), teacher.teacher_chunk_id.contiguous()
    if chunks:
        blocks = ceil_div(max(student.numel(), theirs.numel()), _BLOCK)
        launch(
            _extent_kernel, (blocks, 2), student, theirs, extents, student.shape[1], theirs.shape[1], student.numel(), theirs.numel(),
            chunks, per_row, FIRST=first, BLOCK=_BLOCK,
        )  # fmt: skip
        valid = teacher.chunk_valid.contiguous()
        exact = valid if teacher.chunk_exact is None else teacher.chunk_exact.contiguous()
        launch(
            _valid_kernel, (ceil_div(chunks, _BLOCK),), valid, exact, sample_mask.contiguous(), extents, chunks, per_row,
            student.shape[1], theirs.shape[1], EXACT=spec.exact_match_only, FIRST=first, BLOCK=_BLOCK,
        )  # fmt: skip
    return extents


def valid_chunks(teacher: TeacherBatch, sample_mask: Tensor, spec: LossSpec) -> Tensor:
    """0-dim int64: how many chunks are valid."""
    return torch.count_nonzero(chunk_extents(teacher, sample_mask, spec)[0, 2])


def chunk_rows(teacher: TeacherBatch, sample_mask: Tensor, spec: LossSpec) -> tuple[Rows, Rows]:
    """The student's and the teacher's rows of every chunk."""
    extents = chunk_extents(teacher, sample_mask, spec)
    assert teacher.student_chunk_id is not None and teacher.teacher_chunk_id is not None and teacher.chunk_valid is not None
    student, theirs = teacher.student_chunk_id.contiguous(), teacher.teacher_chunk_id.contiguous()
    sizes = student.numel(), theirs.numel()
    chunk = [torch.empty(n, dtype=torch.int32, device=extents.device) for n in sizes]
    active = [torch.empty(n, dtype=torch.bool, device=extents.device) for n in sizes]
    launch(
        _row_chunk_kernel, (ceil_div(max(sizes), _BLOCK), 2), student, theirs, extents, *chunk, *active, student.shape[1],
        theirs.shape[1], *sizes, extents.shape[2], teacher.chunk_valid.shape[1], FIRST=spec.chunk_distribution == "first", BLOCK=_BLOCK,
    )  # fmt: skip
    first, last, count, t_first, t_last, t_count = extents.view(6, -1).unbind()
    return Rows(chunk[0], active[0], first, last, count), Rows(chunk[1], active[1], t_first, t_last, t_count)


@triton.jit
def mean_log_prob(logits, stride, tile, lse, row_chunk, chunk, first, last, column, mask, inv_tau):
    """At `column`s, the mean of logits / τ - lse over the rows of a chunk; the tile of both begins with row `tile`.

    Logits are summed before their log-sum-exps are taken off: equal sums stay equal.
    """
    total = tl.zeros(column.shape, tl.float32)
    norm = tl.zeros([], tl.float32)
    count = tl.zeros([], tl.float32)
    for row in range(first, last + 1):
        if tl.load(row_chunk + row) == chunk:
            local = tl.cast(row, tl.int64) - tile
            total += tl.load(logits + local * stride + column, mask=mask, other=0.0).to(tl.float32)
            norm += tl.load(lse + local)
            count += 1.0
    return (total * inv_tau - norm) / count
