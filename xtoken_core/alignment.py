"""Byte-exact chunk alignment of two tokenizations of one text.

A chunk is a smallest stretch of text at whose two ends both tokenizations have a token boundary. Boundaries are byte
offsets, so the common ones are an intersection of two sorted lists: linear, and in numpy throughout. Where the two
sides spell different texts (a normaliser at work, bytes that one vocabulary lacks), the stretch between the last equal
byte and the next equal ones is a chunk of its own, marked inexact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xtoken_core.tokenization import TokenTable

_RESYNC = 8  # bytes that must agree before two differing texts count as together again


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which tokens of two tokenizations stand for the same stretch of text."""

    student_chunk_id: np.ndarray
    """int32 [T_s]: chunk of each student token; -1 for special tokens and for a tail that only one side has."""
    teacher_chunk_id: np.ndarray
    """int32 [T_t]."""
    num_chunks: int
    exact: np.ndarray
    """bool [num_chunks]: the chunk's bytes are equal on both sides."""


def align(student_ids: Any, teacher_ids: Any, student_table: TokenTable, teacher_table: TokenTable) -> Alignment:
    """Aligns two tokenizations of one text.

    Ids are 1-D integer sequences (lists, arrays, CPU tensors), with or without special tokens. A space that a
    tokenizer put in front of the text counts as no text. If one side ends early (truncation), the other's tail gets no
    chunk. Raises ValueError for ids outside the vocabulary, and if the two texts have nothing in common.
    """
    student, teacher = _Side(student_ids, student_table), _Side(teacher_ids, teacher_table)
    if student.text != teacher.text and (student_table.dummy_prefix or teacher_table.dummy_prefix):
        student, teacher = student.without_prefix(), teacher.without_prefix()
    if student.text == teacher.text:
        return _align_equal(student, teacher)
    return _align_different(student, teacher)


def align_rows(
    student_rows: Sequence[Any], teacher_rows: Sequence[Any], student_table: TokenTable, teacher_table: TokenTable
) -> list[Alignment]:
    """`align` of each pair of rows."""
    return [align(s, t, student_table, teacher_table) for s, t in zip(student_rows, teacher_rows, strict=True)]


class _Side:
    """One tokenization: its bytes and, per token, where they end."""

    def __init__(self, ids: Any, table: TokenTable, trimmed: np.ndarray | None = None):
        self.ids = np.asarray(ids, dtype=np.int64)
        if self.ids.ndim != 1:
            raise ValueError(f"token ids: expected one dimension, got shape {self.ids.shape}")
        if self.ids.size and not 0 <= self.ids.min() <= self.ids.max() < len(table):
            raise ValueError(f"token ids: outside the vocabulary of {len(table)} ids")
        self.table = table
        pieces = table.objects[self.ids].tolist()
        self.lengths = table.lengths[self.ids]
        if trimmed is not None:
            for i in trimmed.tolist():
                pieces[i] = pieces[i][1:]
            self.lengths[trimmed] -= 1
        self.text = b"".join(pieces)
        self.ends = np.cumsum(self.lengths, dtype=np.int64)

    def without_prefix(self) -> _Side:
        """Without the space in front of each stretch of text, where the tokenizer puts one there."""
        if not self.table.dummy_prefix:
            return self
        text = ~self.table.special[self.ids]
        starts = np.flatnonzero(text & ~np.concatenate(([False], text[:-1])))
        return _Side(self.ids, self.table, np.array([i for i in starts if self.table[self.ids[i]][:1] == b" "], dtype=np.int64))

    def chunk_ids(self, boundaries: np.ndarray) -> np.ndarray:
        """Chunk of each token, given the byte offsets at which chunks end. An empty prefix joins the next chunk."""
        chunk = np.searchsorted(boundaries, self.ends, side="left").astype(np.int32)
        empty = self.lengths == 0
        if empty.any():
            chunk[empty] = np.searchsorted(boundaries, self.ends[empty], side="right")
            chunk[self.table.special[self.ids]] = -1
        chunk[chunk == len(boundaries)] = -1
        return chunk


def _align_equal(student: _Side, teacher: _Side) -> Alignment:
    """Both sides spell the same text: chunks end where both have a boundary."""
    ends = np.zeros(len(student.text) + 1, dtype=bool)
    ends[teacher.ends] = True
    ends[0] = False
    marked = np.zeros(len(ends), dtype=bool)
    marked[student.ends] = True
    boundaries = np.flatnonzero(ends & marked)
    return Alignment(
        student.chunk_ids(boundaries), teacher.chunk_ids(boundaries), len(boundaries), np.ones(len(boundaries), dtype=bool)
    )


def _align_different(student: _Side, teacher: _Side) -> Alignment:
    """The sides spell different texts: chunks end at common boundaries of the stretches that agree."""
    runs = np.array(_equal_runs(student.text, teacher.text), dtype=np.int64).reshape(-1, 3)
    if not runs[:, 2].any() and student.text and teacher.text:
        raise ValueError("the two tokenizations spell different texts: no stretch in common")
    # teacher offset of every student boundary that lies in an equal run, wherever the teacher has a boundary there too
    at = np.unique(student.ends)
    teacher_ends = np.zeros(len(teacher.text) + 1, dtype=bool)
    teacher_ends[teacher.ends] = True
    pairs = []
    for i, j, n in runs.tolist():
        inside = at[(at >= i) & (at <= i + n)]
        inside = inside[teacher_ends[inside - i + j]]
        pairs.append(np.stack([inside, inside - i + j], axis=1))
    pairs = np.concatenate(pairs) if pairs else np.empty((0, 2), dtype=np.int64)
    pairs = pairs[(pairs > 0).all(axis=1)]
    advances = np.ones(len(pairs), dtype=bool)  # a chunk has text on both sides; text of one side alone joins the next
    last = np.zeros(2, dtype=np.int64)
    for k, pair in enumerate(pairs):
        advances[k] = (pair > last).all()
        last = pair if advances[k] else last
    pairs = pairs[advances]
    starts = np.concatenate([np.zeros((1, 2), dtype=np.int64), pairs[:-1]]) if len(pairs) else pairs
    exact = np.array(
        [student.text[a:c] == teacher.text[b:d] for (a, b), (c, d) in zip(starts.tolist(), pairs.tolist())], dtype=bool
    )
    return Alignment(student.chunk_ids(pairs[:, 0]), teacher.chunk_ids(pairs[:, 1]), len(pairs), exact)


def _equal_runs(a: bytes, b: bytes) -> list[tuple[int, int, int]]:
    """(start in a, start in b, length) of the stretches that agree, in order.

    Both ends of the text count as agreeing, unless one side merely stops early.
    """
    left, right = np.frombuffer(a, dtype=np.uint8), np.frombuffer(b, dtype=np.uint8)
    runs, i, j = [], 0, 0
    while True:
        n = _common_prefix(left[i:], right[j:])
        runs.append((i, j, n))
        i, j = i + n, j + n
        if i == len(a) or j == len(b):
            return runs
        found = _next_meeting(left[i:], right[j:])
        if found is None:
            return [*runs, (len(a), len(b), 0)]
        i, j = i + found[0], j + found[1]


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    limit, done, step = min(len(a), len(b)), 0, 64
    while done < limit:
        end = min(done + step, limit)
        differ = a[done:end] != b[done:end]
        if differ.any():
            return done + int(differ.argmax())
        done, step = end, step * 2
    return limit


def _next_meeting(a: np.ndarray, b: np.ndarray) -> tuple[int, int] | None:
    """The nearest offsets (smallest sum) from which a and b agree on `_RESYNC` bytes, or to their ends."""
    window = 64
    while True:
        grams_a, grams_b = _grams(a, window), _grams(b, window)
        _, in_a, in_b = np.intersect1d(grams_a, grams_b, return_indices=True)
        if len(in_a):
            nearest = np.argmin(in_a + in_b)
            return int(in_a[nearest]), int(in_b[nearest])
        if window >= max(len(a), len(b)):
            return None
        window *= 4


def _grams(text: np.ndarray, window: int) -> np.ndarray:
    """Every `_RESYNC` bytes that start in the first `window` bytes, as numbers; the end is padded."""
    padded = np.concatenate(
        [text[: window + _RESYNC - 1], np.zeros(max(0, min(_RESYNC - 1, window + _RESYNC - 1 - len(text))), np.uint8)]
    )
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(padded, _RESYNC)).view(np.uint64).ravel()
