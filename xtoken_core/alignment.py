"""Byte-exact chunk alignment of two tokenizations of one text.

A chunk is a smallest stretch of text at whose two ends both tokenizations have a token boundary. Boundaries are byte
offsets, so the common ones are an intersection of two sets: linear, and in numpy throughout. Where the two sides spell
different texts (a normaliser at work, bytes that one vocabulary lacks), everything between the last common boundary
before the difference and the first one after it is a chunk marked inexact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from xtoken_core.token_hashes import HASH_BASE, SPACE_HASH, hash_powers
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
    student, teacher = _Side.read([student_ids], student_table), _Side.read([teacher_ids], teacher_table)
    student, teacher = _without_dummy_prefixes(student, teacher)
    if _same_text(student, teacher):
        return _align_equal(student, teacher)[0]
    return _align_different(student, teacher)


def align_rows(
    student_rows: Sequence[Any], teacher_rows: Sequence[Any], student_table: TokenTable, teacher_table: TokenTable
) -> list[Alignment]:
    """`align` of each pair of rows, in one go where both sides spell the same text in every row."""
    student, teacher = _Side.read(student_rows, student_table), _Side.read(teacher_rows, teacher_table)
    student, teacher = _without_dummy_prefixes(student, teacher)
    if _same_text(student, teacher):
        return _align_equal(student, teacher)
    return [align(s, t, student_table, teacher_table) for s, t in zip(student_rows, teacher_rows, strict=True)]


class _Side:
    """The tokens of one side, rows one after the other, and where in their bytes each ends."""

    def __init__(self, table: TokenTable, ids: np.ndarray, rows: np.ndarray, trimmed: np.ndarray | None = None):
        self.table, self.ids = table, ids
        self.rows = rows
        """int64 [R + 1]: where rows begin, in tokens; the last is the end."""
        self.trimmed = trimmed
        """Places of tokens whose first byte, an added space, is left out; None: none."""

    @classmethod
    def read(cls, rows: Sequence[Any], table: TokenTable) -> _Side:
        arrays = [np.asarray(row, dtype=np.int64) for row in rows]
        for array in arrays:
            if array.ndim != 1:
                raise ValueError(f"token ids: expected one dimension, got shape {array.shape}")
        ids = arrays[0] if len(arrays) == 1 else np.concatenate(arrays or [np.empty(0, np.int64)])
        if ids.size and not 0 <= ids.min() <= ids.max() < len(table):
            raise ValueError(f"token ids: outside the vocabulary of {len(table)} ids")
        return cls(table, ids, np.cumsum([0, *map(len, arrays)]))

    def without_dummy_prefix(self, chosen: np.ndarray) -> _Side:
        """Without the space that the tokenizer puts in front of text (and maybe again after special tokens), in the rows
        of the mask `chosen` [R]."""
        if not self.table.dummy_prefix:
            return self
        starts = self.rows[:-1]
        if self.table.dummy_after_special:
            starts = np.concatenate((starts, self.special + 1))
        starts = np.unique(starts[starts < len(self.ids)])
        while (leads := self.table.special[self.ids[starts]]).any():  # the text begins after leading special tokens
            starts = starts + leads
            starts = np.unique(starts[starts < len(self.ids)])
        in_row = np.searchsorted(self.rows, starts, side="right") - 1
        added = chosen[in_row] & self.table.starts_with_space[self.ids[starts]]
        return _Side(self.table, self.ids, self.rows, starts[added])

    @cached_property
    def special(self) -> np.ndarray:
        """Places of special tokens."""
        return np.flatnonzero(self.table.special[self.ids])

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [T]: bytes of each token."""
        lengths = self.table.lengths[self.ids]
        if self.trimmed is not None:
            lengths[self.trimmed] -= 1
        return lengths

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 [T]: where each token ends, in bytes."""
        return np.cumsum(self.lengths, dtype=np.int64)

    @cached_property
    def size(self) -> int:
        """Bytes of all rows."""
        return int(self.ends[-1]) if len(self.ids) else 0

    @cached_property
    def digest(self) -> int:
        """Content hash of the bytes of all rows."""
        hashes = self.table.hashes[self.ids]
        if self.trimmed is not None:
            hashes[self.trimmed] = (hashes[self.trimmed] - SPACE_HASH) * _INVERSE_BASE
        return int(np.dot(hashes, hash_powers(self.ends - self.lengths)))

    def text(self) -> bytes:
        """The bytes of all rows."""
        pieces = self.table.objects[self.ids].tolist()
        for place in () if self.trimmed is None else self.trimmed.tolist():
            pieces[place] = pieces[place][1:]
        return b"".join(pieces)

    def row_ends(self) -> np.ndarray:
        """int64 [R]: where rows end, in bytes."""
        return np.concatenate(([0], self.ends))[self.rows[1:]]

    def boundaries(self) -> np.ndarray:
        """bool [bytes + 1]: a token ends at this offset. The start of the text is none."""
        mask = np.zeros(self.size + 1, dtype=bool)
        mask[self.ends] = True
        mask[0] = False
        return mask

    def chunk_ids(self, boundaries: np.ndarray) -> tuple[list[np.ndarray], list[int]]:
        """Chunk of each token, int32 [T] for each row, and the number of chunks of each row, given the offsets (as a
        mask) at which chunks end."""
        closed = np.zeros(len(self.ids) + 1, dtype=np.int32)  # chunks that end before a token, over all rows
        np.cumsum(boundaries[self.ends] & (self.lengths > 0), out=closed[1:])
        at_row, tokens = closed[self.rows], np.diff(self.rows)
        chunk = closed[:-1] - np.repeat(at_row[:-1], tokens)
        counts = np.diff(at_row)
        chunk[chunk == np.repeat(counts, tokens)] = -1  # after the row's last chunk
        chunk[self.special] = -1
        return np.split(chunk, self.rows[1:-1]), counts.tolist()


_INVERSE_BASE = np.uint64(pow(int(HASH_BASE), -1, 2**64))


def _same_text(student: _Side, teacher: _Side) -> bool:
    """Whether both sides have the same bytes in every row: the sizes agree, and a 64-bit hash of the content."""
    return (
        student.size == teacher.size
        and np.array_equal(student.row_ends(), teacher.row_ends())
        and student.digest == teacher.digest
    )


def _without_dummy_prefixes(student: _Side, teacher: _Side) -> tuple[_Side, _Side]:
    """Both sides without the spaces that their tokenizers put in front of text.

    Llama-2's tokenizer always adds one and Metaspace only if there is none, and rows may be cut out of longer ones: that
    one was added shows in the other side, which is shorter by it.
    """
    if not (student.table.dummy_prefix or teacher.table.dummy_prefix):
        return student, teacher
    least = 0 if student.table.dummy_prefix and teacher.table.dummy_prefix else 1
    longer = np.diff(student.row_ends(), prepend=0) - np.diff(teacher.row_ends(), prepend=0)
    fitting = student.without_dummy_prefix(longer >= least), teacher.without_dummy_prefix(-longer >= least)
    if _same_text(*fitting):
        return fitting
    every = np.ones(len(longer), dtype=bool)
    return student.without_dummy_prefix(every), teacher.without_dummy_prefix(every)


def _align_equal(student: _Side, teacher: _Side) -> list[Alignment]:
    """Both sides spell the same text in every row: chunks end where both have a boundary."""
    boundaries = student.boundaries() & teacher.boundaries()
    (of_student, counts), (of_teacher, _) = student.chunk_ids(boundaries), teacher.chunk_ids(boundaries)
    return [Alignment(s, t, n, np.ones(n, dtype=bool)) for s, t, n in zip(of_student, of_teacher, counts)]


def _align_different(student: _Side, teacher: _Side) -> Alignment:
    """The sides spell different texts: chunks end at common boundaries within the stretches that agree."""
    runs = _equal_runs(np.frombuffer(student.text(), dtype=np.uint8), np.frombuffer(teacher.text(), dtype=np.uint8))
    agree, shorter = sum(n for _, _, n in runs), min(student.size, teacher.size)
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
        boundaries = np.zeros(side.size + 1, dtype=bool)
        boundaries[ends] = True
        sides.append(side.chunk_ids(boundaries)[0][0])
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
