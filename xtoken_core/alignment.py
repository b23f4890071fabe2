"""Byte-exact chunk alignment of two tokenizations of one text.

A chunk is a smallest stretch of text at whose two ends both tokenizations have a token boundary. Boundaries are byte
offsets, so the common ones are an intersection of two sets: linear, and in numpy throughout. Where the two sides spell
different texts (a normaliser at work, bytes that one vocabulary lacks), everything between the last common boundary
before the difference and the first one after it is a chunk marked inexact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xtoken_core.tokenization import TokenTable

_RESYNC = 8  # bytes that must agree before two differing texts count as together again; one 64-bit number


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which tokens of two tokenizations stand for the same stretch of text."""

    student_chunk_id: np.ndarray
    """int32 [T_s]: chunk of each student token; -1 for special tokens, and for a tail that only one side has."""
    teacher_chunk_id: np.ndarray
    """int32 [T_t]."""
    num_chunks: int
    exact: np.ndarray
    """bool [num_chunks]: the chunk's bytes are equal on both sides."""


def align(student_ids: Any, teacher_ids: Any, student_table: TokenTable, teacher_table: TokenTable) -> Alignment:
    """Aligns two tokenizations of one text.

    Ids are 1-D integer sequences (lists, arrays, CPU tensors), with or without special tokens, which belong to no chunk.
    A space that a tokenizer put in front of the text counts as no text; a token that is nothing else joins the next
    chunk. If one side ends early (truncation), the other's tail gets no chunk. Raises ValueError for ids outside the
    vocabulary, and if less than half of the shorter text is in the other.
    """
    student, teacher = _Side.read(student_ids, student_table), _Side.read(teacher_ids, teacher_table)
    student, teacher = _drop_dummy_prefixes(student, teacher, student_table, teacher_table)
    if student.text == teacher.text:
        boundaries = student.boundaries() & teacher.boundaries()
        count = int(np.count_nonzero(boundaries))
        return Alignment(student.chunk_ids(boundaries), teacher.chunk_ids(boundaries), count, np.ones(count, dtype=bool))
    return _align_different(student, teacher)


def align_rows(
    student_rows: Sequence[Any], teacher_rows: Sequence[Any], student_table: TokenTable, teacher_table: TokenTable
) -> list[Alignment]:
    """`align` of each pair of rows."""
    return [align(s, t, student_table, teacher_table) for s, t in zip(student_rows, teacher_rows, strict=True)]


@dataclass(frozen=True, eq=False)
class _Side:
    """One tokenization: its bytes, and where in them each token ends."""

    text: bytes
    ends: np.ndarray
    """int64 [T], never falling."""
    special: np.ndarray
    """bool [T]."""

    @classmethod
    def read(cls, ids: Any, table: TokenTable) -> _Side:
        ids = np.asarray(ids, dtype=np.int64)
        if ids.ndim != 1:
            raise ValueError(f"token ids: expected one dimension, got shape {ids.shape}")
        if ids.size and not 0 <= ids.min() <= ids.max() < len(table):
            raise ValueError(f"token ids: outside the vocabulary of {len(table)} ids")
        text = b"".join(table.objects[ids].tolist())
        return cls(text, np.cumsum(table.lengths[ids], dtype=np.int64), table.special[ids])

    def without_dummy_prefix(self) -> _Side:
        """Without the first space of each stretch of text between special tokens."""
        starts = np.flatnonzero(~self.special & np.concatenate(([True], self.special[:-1])))
        offsets = np.concatenate(([0], self.ends))[starts]
        text = np.frombuffer(self.text, dtype=np.uint8)
        is_space = text[offsets] == ord(" ")
        removed = np.zeros(len(self.ends), dtype=np.int64)
        removed[starts[is_space]] = 1
        return _Side(np.delete(text, offsets[is_space]).tobytes(), self.ends - np.cumsum(removed), self.special)

    def boundaries(self) -> np.ndarray:
        """bool [bytes + 1]: a token ends at this offset. The start of the text is none."""
        mask = np.zeros(len(self.text) + 1, dtype=bool)
        mask[self.ends] = True
        mask[0] = False
        return mask

    def chunk_ids(self, boundaries: np.ndarray) -> np.ndarray:
        """int32 [T]: chunk of each token, given the offsets (as a mask) at which chunks end."""
        closes = boundaries[self.ends]
        closes[1:] &= self.ends[1:] > self.ends[:-1]  # a token without text closes nothing
        closed = np.cumsum(closes, dtype=np.int32)
        chunk = closed - closes
        chunk[self.special] = -1
        if len(closed):
            chunk[chunk == closed[-1]] = -1  # after the last common boundary
        return chunk


def _drop_dummy_prefixes(
    student: _Side, teacher: _Side, student_table: TokenTable, teacher_table: TokenTable
) -> tuple[_Side, _Side]:
    """Both sides without the spaces that their tokenizers put in front of text, as far as that makes them agree.

    Llama-2's tokenizer always adds one and Metaspace only if there is none, so what was added shows in the other side.
    """
    if student.text == teacher.text or not (student_table.dummy_prefix or teacher_table.dummy_prefix):
        return student, teacher
    bare_student = student.without_dummy_prefix() if student_table.dummy_prefix else student
    bare_teacher = teacher.without_dummy_prefix() if teacher_table.dummy_prefix else teacher
    for s, t in ((bare_student, bare_teacher), (bare_student, teacher), (student, bare_teacher)):
        if s.text == t.text:
            return s, t
    return bare_student, bare_teacher


def _align_different(student: _Side, teacher: _Side) -> Alignment:
    """The sides spell different texts: chunks end at common boundaries within the stretches that agree."""
    runs = _equal_runs(np.frombuffer(student.text, dtype=np.uint8), np.frombuffer(teacher.text, dtype=np.uint8))
    agree, shorter = sum(n for _, _, n in runs), min(len(student.text), len(teacher.text))
    if 2 * agree < shorter:
        raise ValueError(f"the two tokenizations spell different texts: {agree} of {shorter} bytes agree")

    student_ends, teacher_has = np.flatnonzero(student.boundaries()), teacher.boundaries()
    found = []  # (student offset, teacher offset, run) of every common boundary
    for run, (i, j, n) in enumerate(runs):
        at = student_ends[np.searchsorted(student_ends, i) : np.searchsorted(student_ends, i + n, side="right")]
        at = at[teacher_has[at - i + j]]
        found.append(np.stack([at, at - i + j, np.full(len(at), run)], axis=1))
    pairs = np.concatenate(found)
    # a chunk has text on both sides: what only one side has, between two runs, joins the chunk after it
    pairs = pairs[(np.diff(pairs[:, :2], axis=0, prepend=0) > 0).all(axis=1)]
    same_run = np.diff(pairs[:, 2], prepend=0) == 0

    sides = []
    for side, ends in ((student, pairs[:, 0]), (teacher, pairs[:, 1])):
        boundaries = np.zeros(len(side.text) + 1, dtype=bool)
        boundaries[ends] = True
        sides.append(side.chunk_ids(boundaries))
    return Alignment(sides[0], sides[1], len(pairs), same_run)


def _equal_runs(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int, int]]:
    """(start in a, start in b, length) of the stretches of bytes that agree, in order.

    The ends of the two texts count as agreeing, unless one side merely stops early.
    """
    runs, i, j = [], 0, 0
    while True:
        n = _common_prefix(a[i:], b[j:])
        runs.append((i, j, n))
        i, j = i + n, j + n
        if i == len(a) or j == len(b):
            return runs
        meeting = _next_meeting(a[i:], b[j:])
        if meeting is None:
            return [*runs, (len(a), len(b), 0)]
        i, j = i + meeting[0], j + meeting[1]


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix, in steps that grow so that the cost follows the length."""
    limit, done, step = min(len(a), len(b)), 0, 64
    while done < limit:
        end = min(done + step, limit)
        differ = a[done:end] != b[done:end]
        if differ.any():
            return done + int(differ.argmax())
        done, step = end, step * 2
    return limit


def _next_meeting(a: np.ndarray, b: np.ndarray) -> tuple[int, int] | None:
    """The nearest offsets (of smallest sum) from which a and b agree for `_RESYNC` bytes, or to both ends."""
    window = 32
    while True:
        _, in_a, in_b = np.intersect1d(_grams(a, window), _grams(b, window), return_indices=True)
        if len(in_a):
            nearest = np.argmin(in_a + in_b)
            return int(in_a[nearest]), int(in_b[nearest])
        if window >= max(len(a), len(b)):
            return None
        window *= 4


def _grams(text: np.ndarray, window: int) -> np.ndarray:
    """uint64: the `_RESYNC` bytes from each of the first `window` offsets; past the end of the text they are zeros."""
    text = text[: window + _RESYNC - 1]
    padded = np.concatenate([text, np.zeros(_RESYNC - 1, dtype=np.uint8)])
    grams = np.lib.stride_tricks.sliding_window_view(padded, _RESYNC)[: min(window, len(text))]
    return np.ascontiguousarray(grams).view(np.uint64).ravel()
