"""From a document to rows: tokenized by everyone, aligned, cut where all tokenizations meet. Pure functions on arrays.

A document is tokenized whole and its *token sequences* are cut. Tokenizing the cut text again would be wrong twice over:
a piece on its own may tokenize differently (spaces at its start, a SentencePiece prefix, merges across the cut), so that
it no longer fits the limit, and the student would train on tokens that no text yields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from xtoken_core.alignment import align
from xtoken_core.spec import DistillationSpec
from xtoken_core.tokenization import TokenTable, encode, load_tokenizer, row_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Side:
    """A tokenizer that takes part: the student's, or that of a teacher with another vocabulary."""

    name: str
    """`student` or `teacher ID`, for messages."""
    column: str
    """Prefix of its columns: `student`, or `teacher_I` with I the position among all teachers of the spec."""
    tokenizer: PreTrainedTokenizerFast
    table: TokenTable
    bos: int | None
    """The id that opens a row, if the tokenizer has its rows opened by one."""

    @classmethod
    def of(cls, name: str, column: str, tokenizer: PreTrainedTokenizerFast) -> Side:
        """The side of a loaded tokenizer."""
        return cls(name, column, tokenizer, TokenTable.from_tokenizer(tokenizer), row_bos(tokenizer))

    @property
    def pad(self) -> int:
        """The id that fills up rows; any will do, since padding is masked everywhere."""
        return self.table.roles.get("pad", 0)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids (int32) of each text, without BOS."""
        return [np.array(ids, dtype=np.int32) for ids in encode(self.tokenizer, list(texts))]


def load_sides(spec: DistillationSpec) -> list[Side]:
    """The student's side first, then those of the cross-tokenizer teachers in their order. Raises InputError."""
    student = Side.of("student", "student", load_tokenizer(spec.student.model, spec.student.tokenizer))
    return [student] + [
        Side.of(f"teacher {teacher.id}", f"teacher_{i}", load_tokenizer(teacher.model, teacher.tokenizer))
        for i, teacher in enumerate(spec.teachers)
        if teacher.cross_tokenizer
    ]


@dataclass(frozen=True)
class Tokenized:
    """One document in every tokenization; lists run over the sides, student first."""

    ids: list[np.ndarray]
    """int32 [T] each."""
    widths: list[np.ndarray]
    """uint16 [T] each: bytes of the text that the token covers."""
    targets: list[np.ndarray]
    """uint8 [T] each: 1 where the token is to be learned."""
    chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    """Per teacher: chunk ids of the student's tokens, of the teacher's tokens (int32, -1 outside), exact (bool [C])."""
    cuts: np.ndarray
    """int64 [K, sides], ascending from zeros: token counts at which every side stands at the same place in the text."""


def tokenize_texts(texts: Sequence[str], sides: Sequence[Side]) -> list[Tokenized | str]:
    """Tokenizes and aligns texts; in place of one that cannot be aligned stands the reason why.

    The texts are as `normalize_for` leaves them. Characters that a vocabulary cannot spell make inexact chunks.
    """
    encoded = [side.encode(texts) for side in sides]
    return [_tokenized([ids[i] for ids in encoded], sides) for i in range(len(texts))]


def _tokenized(ids: list[np.ndarray], sides: Sequence[Side]) -> Tokenized | str:
    chunks = []
    for side, tokens in zip(sides[1:], ids[1:]):
        try:
            found = align(ids[0], tokens, sides[0].table, side.table)
        except ValueError as e:
            return f"{side.name}: {e}"
        chunks.append((found.student_chunk_id, found.teacher_chunk_id, found.exact))
    widths = [text_widths(side.table, tokens) for side, tokens in zip(sides, ids)]
    targets = [(~side.table.special[tokens]).astype(np.uint8) for side, tokens in zip(sides, ids)]
    return Tokenized(ids, widths, targets, chunks, common_cuts(chunks, [len(tokens) for tokens in ids]))


def text_widths(table: TokenTable, ids: np.ndarray) -> np.ndarray:
    """Bytes of text under each token of a text (uint16); the space that SentencePiece puts in front is no text."""
    widths = table.lengths[ids].astype(np.uint16)
    if table.prefix_space and len(ids) and table[ids[0]][:1] == b" ":
        widths[0] -= 1
    return widths


def common_cuts(chunks: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], lengths: Sequence[int]) -> np.ndarray:
    """Token counts [K, sides] at which all tokenizations stand at the end of a chunk, from zeros on.

    lengths: tokens of each side. Without teachers of another vocabulary every token ends at a cut.
    """
    if not chunks:
        return np.arange(lengths[0] + 1)[:, None]
    ends = [(_chunk_ends(s, len(exact)), _chunk_ends(t, len(exact))) for s, t, exact in chunks]
    shared = reduce(np.intersect1d, [s for s, _ in ends])
    columns = [shared, *(t[np.searchsorted(s, shared)] for s, t in ends)]
    return np.concatenate([np.zeros((1, len(columns)), np.int64), np.stack(columns, axis=1)])


def _chunk_ends(chunk_id: np.ndarray, num_chunks: int) -> np.ndarray:
    """[C]: tokens up to and with the last one of each chunk."""
    ends = np.zeros(num_chunks, np.int64)
    inside = np.flatnonzero(chunk_id >= 0)
    ends[chunk_id[inside]] = inside + 1  # of several tokens the last one stays
    return ends


def spans(cuts: np.ndarray, limits: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches (first cut, last cut) as long as every side's limit allows, one after the other.

    A stretch between neighbouring cuts that is by itself too long for some side is left out.
    """
    found, start, last = [], 0, len(cuts) - 1
    while start < last:
        end = min(int(np.searchsorted(cuts[:, s], cuts[start, s] + limit, side="right")) for s, limit in enumerate(limits)) - 1
        if end > start:
            found.append((start, end))
        start = max(end, start + 1)
    return found


def make_row(document: Tokenized, span: tuple[int, int], sides: Sequence[Side]) -> dict[str, Any]:
    """The columns of the row between two cuts, each side opened by its BOS."""
    low, high = document.cuts[span[0]], document.cuts[span[1]]
    row: dict[str, Any] = {"num_bytes": int(document.widths[0][low[0] : high[0]].sum())}
    for s, side in enumerate(sides):
        part = slice(low[s], high[s])
        row[f"{side.column}_ids"] = _opened(document.ids[s][part], side.bos, side.bos)
        row[f"{side.column}_mask"] = _opened(document.targets[s][part], side.bos, 0)
        row[f"{side.column}_bytes"] = _opened(document.widths[s][part], side.bos, 0)
        if s > 0:
            student_chunks, teacher_chunks, exact = document.chunks[s - 1]
            student_part, teacher_part = student_chunks[low[0] : high[0]], teacher_chunks[part]
            inside = student_part[student_part >= 0]
            first, count = (int(inside[0]), int(inside[-1] - inside[0]) + 1) if len(inside) else (0, 0)
            row[f"{side.column}_student_chunk_id"] = _opened(_renumbered(student_part, first), sides[0].bos, -1)
            row[f"{side.column}_teacher_chunk_id"] = _opened(_renumbered(teacher_part, first), side.bos, -1)
            row[f"{side.column}_chunk_exact"] = exact[first : first + count]
    return row


def _opened(values: np.ndarray, bos: int | None, value: int | None) -> np.ndarray:
    return values if bos is None else np.concatenate([np.array([value], values.dtype), values])


def _renumbered(chunk_id: np.ndarray, first: int) -> np.ndarray:
    return np.where(chunk_id >= 0, chunk_id - first, -1).astype(np.int32)
