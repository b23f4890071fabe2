"""Which rows and columns of the logits a loss reads: small pure functions, the one home of each choice, shared by all implementations.

Row t of the logits predicts token t+1: the *predictor row* of the token at p is p-1, and the token at position 0 has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken_core.losses.logits import LogitsForm, as_form
from xtoken_core.losses.types import TeacherBatch
from xtoken_core.spec import LossSpec

EPSILON = 1e-10
"""Of `chunk_distribution: mean` in p_kl: added to the projected mass within K, and to each of its renormalised entries before the log."""

FLOOR = 2.0**-126
"""`chunk_distribution: first` in p_kl adds no epsilon; the log of less than this (float32's smallest normal number) is the log of this, so that
teacher columns which W does not reach cost much and not infinitely much."""


def next_token_mask(token_mask: Tensor, sample_mask: Tensor) -> Tensor:
    """[B, T] bool: row t counts where the token at t+1 and the sample do; the last row never."""
    mask = torch.zeros(token_mask.shape, dtype=torch.bool, device=token_mask.device)
    mask[:, :-1] = (token_mask[:, 1:] != 0) & (sample_mask != 0)[:, None]
    return mask


def next_token_ids(input_ids: Tensor) -> Tensor:
    """[B, T] int64: the token that each row predicts; the last row's is meaningless (0)."""
    return torch.nn.functional.pad(input_ids[:, 1:], (0, 1))


@dataclass(frozen=True)
class ChunkRows:
    """The valid chunks of a batch, in flat numbers b * C + c, and the predictor rows that belong to each."""

    student: Tensor
    """[B * T_s] int64: the valid chunk of the token that this row predicts, or -1. `first`: only for the chunk's first token."""
    teacher: Tensor
    """[B * T_t] int64, likewise."""
    student_size: Tensor
    """[B * C] int64: rows of each chunk, valid or not."""
    teacher_size: Tensor
    """[B * C] int64."""
    valid: Tensor
    """[B * C] bool."""


def chunk_rows(teacher: TeacherBatch, sample_mask: Tensor, spec: LossSpec) -> ChunkRows:
    """Predictor rows and validity of every chunk of a cross-tokenizer teacher. Never synchronises with the host."""
    assert teacher.student_chunk_id is not None and teacher.teacher_chunk_id is not None and teacher.chunk_valid is not None
    first = spec.chunk_distribution == "first"
    num_chunks = teacher.chunk_valid.shape[1]
    student = _row_chunks(teacher.student_chunk_id, num_chunks, first)
    teachers = _row_chunks(teacher.teacher_chunk_id, num_chunks, first)
    student_size, teacher_size = (_sizes(rows, teacher.chunk_valid.numel()) for rows in (student, teachers))
    valid = valid_chunks(teacher, sample_mask, student_size, teacher_size, spec)
    return ChunkRows(_keep(student, valid), _keep(teachers, valid), student_size, teacher_size, valid)


def valid_chunks(
    teacher: TeacherBatch, sample_mask: Tensor, student_size: Tensor, teacher_size: Tensor, spec: LossSpec
) -> Tensor:
    """[B * C] bool: which chunks are valid. The one place, beside the reference, that decides it.

    A chunk is valid when the batch says so (`chunk_valid`; with `exact_match_only` also `chunk_exact`), its sample counts and
    both sides keep a predictor row: any with `chunk_distribution: mean`, that of its first token with `first`.

    Args:
        teacher: a cross-tokenizer teacher.
        sample_mask: [B].
        student_size: [B * C] predictor rows of each chunk on the student's side.
        teacher_size: [B * C] likewise, on the teacher's.
        spec: read for `exact_match_only`.
    """
    assert teacher.chunk_valid is not None
    exists = teacher.chunk_valid.bool() & (sample_mask != 0)[:, None]
    if spec.exact_match_only:
        assert teacher.chunk_exact is not None
        exists = exists & teacher.chunk_exact.bool()
    return exists.flatten() & (torch.minimum(student_size, teacher_size) > 0)


def _row_chunks(chunk_id: Tensor, num_chunks: int, first: bool) -> Tensor:
    """[B * T]: flat chunk of the token that each row predicts, -1 for none; `first`: -1 unless it is the chunk's first token."""
    b, t = chunk_id.shape
    inside = (chunk_id >= 0) & (chunk_id < num_chunks)
    offset = torch.arange(b, device=chunk_id.device)[:, None] * num_chunks
    flat = torch.where(inside, chunk_id.long() + offset, -1)
    if first:
        position = torch.arange(t, device=chunk_id.device).expand(b, t)
        spare = b * num_chunks
        start = torch.full((spare + 1,), t, device=chunk_id.device)
        start.scatter_reduce_(0, torch.where(inside, flat, spare).flatten(), position.flatten(), "amin")
        flat = torch.where(inside & (start[flat] == position), flat, -1)
    return torch.nn.functional.pad(flat[:, 1:], (0, 1), value=-1).flatten()


def _sizes(row_chunk: Tensor, count: int) -> Tensor:
    size = torch.zeros(count + 1, dtype=torch.int64, device=row_chunk.device)
    return size.scatter_add_(0, torch.where(row_chunk < 0, count, row_chunk), torch.ones_like(row_chunk))[:-1]


def _keep(row_chunk: Tensor, valid: Tensor) -> Tensor:
    if valid.numel() == 0:
        return row_chunk
    return torch.where((row_chunk >= 0) & valid[row_chunk.clamp(min=0)], row_chunk, -1)


def scope_mask(token_mask: Tensor, spec: LossSpec) -> Tensor | None:
    """[B, T] bool: the rows over which the teacher's columns K are chosen; None: all rows of the batch (`topk_scope: batch`).

    `sequence`: the unmasked rows whose next token is unmasked.
    """
    if spec.topk_scope == "batch":
        return None
    mask = torch.zeros(token_mask.shape, dtype=torch.bool, device=token_mask.device)
    mask[:, :-1] = (token_mask[:, :-1] != 0) & (token_mask[:, 1:] != 0)
    return mask


def column_maxima(logits: LogitsForm, rows: Tensor | None) -> Tensor:
    """The largest logit of each column: [B, V] over each sequence's `rows` [B, T], or [1, V] over everything where `rows` is None.

    A column that no row holds gets -inf. Memory: one sequence's logits at a time.
    """
    maxima = [logits.maxima(b, slice(None) if rows is None else rows[b]) for b in range(logits.shape[0])]
    return torch.stack(maxima) if rows is not None else torch.stack(maxima).amax(0, keepdim=True)


def largest_columns(maxima: Tensor, k: int) -> Tensor:
    """[n, min(k, V)] int64: each row's k largest columns, ascending; of equal ones at the edge the lowest."""
    n, vocab = maxima.shape
    if k >= vocab:
        return torch.arange(vocab, device=maxima.device).expand(n, vocab)
    edge = maxima.topk(k, sorted=False).values.amin(1, keepdim=True)
    above = maxima > edge
    level = maxima == edge
    chosen = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return torch.nonzero_static(chosen, size=n * k)[:, 1].view(n, k)


def top_columns(teacher: TeacherBatch, spec: LossSpec) -> Tensor:
    """K: [B, k] int64 columns per sequence (`topk_scope: sequence`) or [1, k] for all (`batch`), ascending; k = min(vocab_topk, V)."""
    vocab = teacher.logits.shape[-1]
    if spec.vocab_topk >= vocab:
        return torch.arange(vocab, device=teacher.logits.device)[None]
    assert teacher.token_mask is not None
    return largest_columns(column_maxima(as_form(teacher.logits), scope_mask(teacher.token_mask, spec)), spec.vocab_topk)
