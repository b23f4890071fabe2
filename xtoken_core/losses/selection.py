"""Which rows and columns of the logits a loss reads: small pure functions, the one home of each choice, shared by all implementations.

Row t of the logits predicts token t+1: the *predictor row* of the token at p is p-1, and the token at position 0 has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xtoken_core.errors import InputError
from xtoken_core.losses.types import AveragedLogits, HiddenLogits, Logits, TeacherBatch, TopKLogits
from xtoken_core.spec import LossSpec

if TYPE_CHECKING:
    from xtoken_core.projection import Projection

EPSILON = 1e-10
"""Of `chunk_distribution: mean` in p_kl: added to the projected mass within K, and to each of its renormalised entries before the log."""

FLOOR = 2.0**-126
"""`chunk_distribution: first` in p_kl adds no epsilon; the log of less than this (float32's smallest normal number) is the log of this, so that
teacher columns which W does not reach cost much and not infinitely much."""

H_KL_THRESHOLD = 0.6
"""Least weight at which a row of W makes a common pair of h_kl."""


# ---------------------------------------------------------------------------------------------------------- teachers


def resolve_teachers(
    teachers: Sequence[TeacherBatch], input_ids: Tensor, token_mask: Tensor, spec: LossSpec
) -> list[TeacherBatch]:
    """The teachers with nothing left open: mode chosen, a same-vocabulary teacher's ids and mask filled in, padded columns cut off.

    Raises InputError where a teacher contradicts the spec, and for a cross-tokenizer teacher whose mode is `auto`.
    """
    return [_resolve(f"teacher {i}", teacher, input_ids, token_mask, spec) for i, teacher in enumerate(teachers)]


def _resolve(name: str, teacher: TeacherBatch, input_ids: Tensor, token_mask: Tensor, spec: LossSpec) -> TeacherBatch:
    if teacher.projection is None:
        if spec.aggregation == "averaged_logits" and isinstance(teacher.logits, TopKLogits):
            raise InputError(f"{name}: aggregation: averaged_logits needs full logits, not their top k")
        return replace(teacher, input_ids=input_ids, token_mask=token_mask, mode=None)
    mode = teacher.mode or spec.mode
    if mode == "auto":
        raise InputError(f"{name}: mode: auto is resolved before the loss, by the coverage audit of the overlap step")
    if spec.exact_match_only and mode != "p_kl":
        raise InputError(f"{name}: mode: {mode} contradicts exact_match_only, which is p_kl's")
    if spec.aggregation == "averaged_logits":
        raise InputError(f"{name}: aggregation: averaged_logits needs teachers with the student's vocabulary")
    if isinstance(teacher.logits, TopKLogits):
        raise InputError(f"{name}: a cross-tokenizer teacher needs full logits, not their top k")
    return replace(teacher, logits=_cut_columns(teacher.logits, teacher.projection.teacher_vocab_size), mode=mode)


def check_vocabularies(teachers: Sequence[TeacherBatch], student_vocab: int) -> None:
    """Raises InputError unless the student's and the teachers' logits have the columns that the projections speak of."""
    for i, teacher in enumerate(teachers):
        vocab = teacher.logits.shape[-1]
        if teacher.projection is None:
            if vocab != student_vocab:
                raise InputError(
                    f"teacher {i}: no projection, yet its logits have {vocab} columns and the student's {student_vocab}"
                )
        elif (rows := teacher.projection.indices.shape[0]) < student_vocab:
            raise InputError(
                f"teacher {i}: projection: {rows} rows, fewer than the {student_vocab} columns of the student's logits"
            )
        elif projection_entries(teacher.projection, student_vocab).columns > vocab:
            raise InputError(f"teacher {i}: projection: points beyond the {vocab} columns of the teacher's logits")


def check_sample_mask(sample_mask: Tensor) -> None:
    """Raises InputError unless every sample of [B] counts or does not: a fraction would count whole in one term, by half in another."""
    if not sample_mask.is_floating_point() or (sample_mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    fractions = sample_mask[(sample_mask != 0) & (sample_mask != 1)]
    if len(fractions):
        raise InputError(f"sample_mask: {fractions[0]:g} is neither 0 nor 1; weigh teachers, not samples")


def _cut_columns(logits: Logits, vocab: int | None) -> Logits:
    """Drops the padding columns of an lm_head that has more rows than its tokenizer has ids."""
    if vocab is None or logits.shape[-1] <= vocab:
        return logits
    if isinstance(logits, HiddenLogits):
        return replace(logits, weight=logits.weight[:vocab], bias=None if logits.bias is None else logits.bias[:vocab])
    assert isinstance(logits, Tensor)
    return logits[..., :vocab]


# -------------------------------------------------------------------------------------------------------------- rows


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
    """Predictor rows and validity of every chunk of a cross-tokenizer teacher. Never synchronises with the host.

    A chunk is valid when the batch says so (`chunk_valid`; with `exact_match_only` also `chunk_exact`), its sample counts and
    both sides keep a predictor row: any with `chunk_distribution: mean`, that of its first token with `first`.
    """
    assert teacher.student_chunk_id is not None and teacher.teacher_chunk_id is not None and teacher.chunk_valid is not None
    first = spec.chunk_distribution == "first"
    num_chunks = teacher.chunk_valid.shape[1]
    student = _row_chunks(teacher.student_chunk_id, num_chunks, first)
    teachers = _row_chunks(teacher.teacher_chunk_id, num_chunks, first)
    student_size, teacher_size = (_sizes(rows, teacher.chunk_valid.numel()) for rows in (student, teachers))
    exists = teacher.chunk_valid.bool() & (sample_mask != 0)[:, None]
    if spec.exact_match_only:
        assert teacher.chunk_exact is not None
        exists = exists & teacher.chunk_exact.bool()
    valid = exists.flatten() & (student_size > 0) & (teacher_size > 0)
    return ChunkRows(_keep(student, valid), _keep(teachers, valid), student_size, teacher_size, valid)


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


# ----------------------------------------------------------------------------------------------------------- columns


def scope_mask(token_mask: Tensor, spec: LossSpec) -> Tensor | None:
    """[B, T] bool: the rows over which the teacher's columns K are chosen; None: all rows of the batch (`topk_scope: batch`).

    `sequence`: the unmasked rows whose next token is unmasked.
    """
    if spec.topk_scope == "batch":
        return None
    mask = torch.zeros(token_mask.shape, dtype=torch.bool, device=token_mask.device)
    mask[:, :-1] = (token_mask[:, :-1] != 0) & (token_mask[:, 1:] != 0)
    return mask


def column_maxima(logits: Logits, rows: Tensor | None) -> Tensor:
    """The largest logit of each column: [B, V] over each sequence's `rows` [B, T], or [1, V] over everything where `rows` is None.

    A column that no row holds gets -inf. Memory: one sequence's logits at a time.
    """
    maxima = [_sequence_maxima(logits, b, None if rows is None else rows[b]) for b in range(logits.shape[0])]
    return torch.stack(maxima) if rows is not None else torch.stack(maxima).amax(0, keepdim=True)


def _sequence_maxima(logits: Logits, b: int, rows: Tensor | None) -> Tensor:
    if isinstance(logits, TopKLogits):
        values, indices = logits.values[b], logits.indices[b].long()
        if rows is not None:
            values, indices = values[rows], indices[rows]
        maxima = values.new_full((logits.vocab_size,), -torch.inf)
        return maxima.scatter_reduce(0, indices.flatten(), values.flatten(), "amax")
    if isinstance(logits, HiddenLogits):
        hidden = logits.hidden[b] if rows is None else logits.hidden[b][rows]
        dense = replace(logits, hidden=hidden[None]).dense()[0]
    else:
        full = logits.dense() if isinstance(logits, AveragedLogits) else logits
        dense = full[b] if rows is None else full[b][rows]
    if dense.shape[0] == 0:
        return dense.new_full((dense.shape[1],), -torch.inf)
    return dense.detach().amax(0)


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
    return largest_columns(column_maxima(teacher.logits, scope_mask(teacher.token_mask, spec)), spec.vocab_topk)


# -------------------------------------------------------------------------------------------------------- projection


@dataclass(frozen=True)
class Entries:
    """The nonzeros of W as a list, ordered by student token."""

    student: Tensor
    """[n] int64."""
    teacher: Tensor
    """[n] int64."""
    slot: Tensor
    """[n] int64: where its weight is in `projection.weights.flatten()`."""
    columns: int
    """One more than the largest teacher id."""


@dataclass(frozen=True)
class CommonPairs:
    """The vocabulary split of gold and h_kl."""

    student: Tensor
    """[n] int64 student ids, ascending; paired with `teacher`."""
    teacher: Tensor
    """[n] int64 teacher ids, each once."""
    uncommon_student: Tensor
    """Ascending ids of the student that are in no pair."""
    uncommon_teacher: Tensor
    """Ascending ids of the teacher that are in no pair."""


_ENTRIES: WeakIdKeyDictionary = WeakIdKeyDictionary()
_PAIRS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def projection_entries(projection: Projection, student_vocab: int) -> Entries:
    """W's nonzeros in its first `student_vocab` rows; computed once per `indices` tensor, so that a learnable W keeps them over steps."""
    tables = _ENTRIES.setdefault(projection.indices, {})
    if student_vocab not in tables:
        flat = projection.indices[:student_vocab].flatten()
        slot = (flat >= 0).nonzero().squeeze(1)
        teacher = flat[slot].long()
        columns = int(teacher.max()) + 1 if teacher.numel() else 0
        tables[student_vocab] = Entries(slot // projection.indices.shape[1], teacher, slot, columns)
    return tables[student_vocab]


def common_pairs(projection: Projection, mode: str, student_vocab: int, teacher_vocab: int) -> CommonPairs:
    """The pairs of gold (exact rows: one entry, of weight 1; on collision the lowest student id) or of h_kl (rows whose largest
    weight is at least 0.6; on collision the largest weight, then the lowest id), and what is left over on both sides.

    Where the projection has an `exact` mask, gold takes it: a repeated id that was summed also looks like one entry of 1.
    Computed once per `weights` tensor, mode and sizes. Source: NeMo-RL's gold loss and its `xtoken_loss` variant; X-Token, arXiv 2605.21699.
    """
    tables = _PAIRS.setdefault(projection.weights, {})
    key = (mode, student_vocab, teacher_vocab)
    if key not in tables:
        tables[key] = _common_pairs(projection, *key)
    return tables[key]


def _common_pairs(projection: Projection, mode: str, student_vocab: int, teacher_vocab: int) -> CommonPairs:
    indices = projection.indices[:student_vocab]
    weights = torch.where(indices >= 0, projection.weights[:student_vocab].detach(), 0)
    weight, slot = weights.max(1)
    if mode == "h_kl":
        paired = weight >= H_KL_THRESHOLD
    elif projection.exact is not None:
        paired = projection.exact[:student_vocab].bool() & (weight > 0)
        weight = torch.ones_like(weight)
    else:
        paired = (weight == 1) & ((weights > 0).sum(1) == 1)
    student = paired.nonzero().squeeze(1)
    student = student[weight[student].sort(descending=True, stable=True).indices]  # best first, then lowest id
    teacher = indices.gather(1, slot[:, None]).squeeze(1)[student].long()
    rank = torch.arange(student.numel(), device=student.device)
    best = torch.full((teacher_vocab,), student.numel(), device=student.device).scatter_reduce(0, teacher, rank, "amin")
    wins = best[teacher] == rank
    student, order = student[wins].sort()
    teacher = teacher[wins][order]
    return CommonPairs(student, teacher, _others(student, student_vocab), _others(teacher, teacher_vocab))


def _others(ids: Tensor, vocab: int) -> Tensor:
    rest = torch.ones(vocab, dtype=torch.bool, device=ids.device)
    rest[ids] = False
    return rest.nonzero().squeeze(1)
