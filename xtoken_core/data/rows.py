"""From a document to rows: tokenized by everyone, aligned, cut where all tokenizations meet. Pure functions on arrays.

A document is tokenized whole and its *token sequences* are cut. Tokenizing the cut text again would be wrong twice over:
a piece on its own may tokenize differently (spaces at its start, a SentencePiece prefix, merges across the cut), so that
it no longer fits the limit, and the student would train on tokens that no text yields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from xtoken_core.alignment import align_rows
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec, TeacherSpec
from xtoken_core.tokenization import TokenTable, encode, load_tokenizer, normalize_for, role_pairs, row_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]
"""Columns of a row, by name: see `data.prepare`."""

Chunks = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Chunk ids of the student's tokens and of the teacher's (int32, -1 outside chunks), and exact (bool [C])."""


NO_TEXT = "no text"
"""Why an empty document has no rows."""

NO_TARGET = "nothing to learn: no message of the role 'assistant' (data.assistant_only) has words"
"""Why a chat has no rows in which nobody says what is to be learned."""


@dataclass(frozen=True)
class Side:
    """A tokenizer that takes part: the student's, or that of a teacher with another vocabulary."""

    name: str
    """`student` or `teacher ID`, for messages."""
    column: str
    """Prefix of its columns: `student`, or `teacher_ID`."""
    tokenizer: PreTrainedTokenizerFast
    table: TokenTable
    bos: int | None
    """The id that opens a row, if the tokenizer has its rows opened by one."""
    teacher: str | None = None
    """Id of the teacher."""

    @classmethod
    def of(cls, name: str, column: str, tokenizer: PreTrainedTokenizerFast, teacher: str | None = None) -> Side:
        """The side of a loaded tokenizer."""
        return cls(name, column, tokenizer, TokenTable.from_tokenizer(tokenizer), row_bos(tokenizer), teacher)

    @cached_property
    def controls(self) -> list[str]:
        """Names of the special tokens that people write into texts: those of roles, and of the chat template."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        roles = set(self.tokenizer.convert_ids_to_tokens(list(self.table.roles.values())))
        template = str(self.tokenizer.chat_template or "")
        return [name for name in special if len(name.strip()) > 2 and (name in roles or name in template)]

    @property
    def pad(self) -> int:
        """The id that fills up rows; any will do, since padding is masked everywhere."""
        return self.table.roles.get("pad", 0)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids (int32) of each text, without BOS."""
        return [np.array(ids, dtype=np.int32) for ids in encode(self.tokenizer, list(texts))]


def teacher_column(teacher: str) -> str:
    """Prefix of the columns of the teacher of this id."""
    return f"teacher_{teacher}"


def read_column(teacher: TeacherSpec) -> str:
    """Prefix of the columns that a teacher reads: its own, or with the student's vocabulary the student's."""
    return teacher_column(teacher.id) if teacher.cross_tokenizer else "student"


def load_sides(spec: DistillationSpec) -> list[Side]:
    """The student's side first, then those of the cross-tokenizer teachers in their order. Raises InputError."""
    student = Side.of("student", "student", load_tokenizer(spec.student.model, spec.student.tokenizer))
    return [student] + [
        Side.of(f"teacher {teacher.id}", teacher_column(teacher.id), load_tokenizer(teacher.model, teacher.tokenizer), teacher.id)
        for teacher in spec.teachers
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
    chunks: list[Chunks]
    """Of each side but the student's."""
    cuts: np.ndarray
    """int64 [K, sides], ascending from zeros: token counts at which every side stands at the same place in the text."""
    remarks: tuple[str, ...] = ()
    """What of the document some side reads in another way than one may think, in words."""

    @property
    def sizes(self) -> np.ndarray:
        """int64 [sides]: tokens of each side."""
        return np.array([len(ids) for ids in self.ids])


def tokenize_texts(texts: Sequence[str], sides: Sequence[Side]) -> list[Tokenized | str]:
    """Tokenizes and aligns texts; in place of one that cannot be aligned stands the reason why.

    Texts are first brought to where every normaliser leaves them alone. Characters that a vocabulary cannot spell make
    inexact chunks.
    """
    normal, unsettled = [], {}
    for i, text in enumerate(texts):
        try:
            normal.append(normalize_for(text, [side.table for side in sides]))
        except InputError as e:
            normal.append("")
            unsettled[i] = str(e)
    encoded = [side.encode(normal) for side in sides]
    aligned = [_aligned(encoded[0], ids, sides[0], side) for side, ids in zip(sides[1:], encoded[1:])]
    found: list[Tokenized | str] = []
    for i, text in enumerate(normal):
        chunks = [teacher[i] for teacher in aligned]
        usable = [chunk for chunk in chunks if not isinstance(chunk, str)]
        reasons = [reason for reason in (unsettled.get(i), *chunks) if isinstance(reason, str)]
        ids = [side[i] for side in encoded]
        found.append(reasons[0] if reasons else _tokenized(ids, usable, len(text.encode()), sides))
    return found


def _aligned(student_ids: list[np.ndarray], ids: list[np.ndarray], student: Side, side: Side) -> list[Chunks | str]:
    """The chunks of each text, or why it has none."""
    try:
        found = align_rows(student_ids, ids, student.table, side.table)
    except ValueError as e:  # some text cannot be aligned: which?
        if len(ids) == 1:
            return [f"{side.name}: {e}"]
        return [_aligned([own], [other], student, side)[0] for own, other in zip(student_ids, ids)]
    return [(a.student_chunk_id, a.teacher_chunk_id, a.exact) for a in found]


def _tokenized(ids: list[np.ndarray], chunks: list[Chunks], size: int, sides: Sequence[Side]) -> Tokenized:
    widths = [text_widths(side.table, tokens, size) for side, tokens in zip(sides, ids)]
    targets = [(~side.table.special[tokens]).astype(np.uint8) for side, tokens in zip(sides, ids)]
    return Tokenized(ids, widths, targets, chunks, common_cuts(chunks, [len(tokens) for tokens in ids]))


def empty(sides: int) -> Tokenized:
    """A document without text."""
    none, cuts = np.zeros(0, np.int32), np.zeros((1, sides), np.int64)
    chunks = [(none, none, none.astype(bool))] * (sides - 1)
    return Tokenized([none] * sides, [none.astype(np.uint16)] * sides, [none.astype(np.uint8)] * sides, chunks, cuts)


def with_eos(document: Tokenized, sides: Sequence[Side]) -> Tokenized:
    """The document with every side's EOS behind it, as a target; a chunk where W pairs the two sides' EOS."""
    if not len(document.ids[0]):
        return document
    ends = [side.table.roles.get("eos") for side in sides]
    ids, widths, targets = [], [], []
    for s, end in enumerate(ends):
        last = np.array([] if end is None else [end], np.int32)
        ids.append(np.concatenate([document.ids[s], last]))
        widths.append(np.concatenate([document.widths[s], np.zeros(len(last), np.uint16)]))
        targets.append(np.concatenate([document.targets[s], np.ones(len(last), np.uint8)]))
    chunks = []
    for (student, teacher, exact), side, end in zip(document.chunks, sides[1:], ends[1:]):
        paired = ends[0] is not None and end is not None and role_pairs(sides[0].table, side.table).get(ends[0]) == end
        own = np.array([len(exact) if paired else -1], np.int32)
        chunks.append(
            (
                np.concatenate([student, own[: ends[0] is not None]]),
                np.concatenate([teacher, own[: end is not None]]),
                np.concatenate([exact, np.ones(int(paired), bool)]),
            )
        )
    sizes = np.array([[len(tokens) for tokens in ids]])
    return replace(
        document,
        ids=ids,
        widths=widths,
        targets=targets,
        chunks=chunks,
        cuts=np.unique(np.concatenate([document.cuts, sizes]), axis=0),
    )


def text_widths(table: TokenTable, ids: np.ndarray, size: int) -> np.ndarray:
    """Bytes of text under each token of a text of `size` bytes (uint16).

    The space that SentencePiece puts in front is not text; where the text has one of its own it may put none.
    """
    widths = table.lengths[ids].astype(np.uint16)
    if table.dummy_prefix and len(ids) and table[ids[0]][:1] == b" " and widths.sum(dtype=np.int64) > size:
        widths[0] -= 1
    return widths


def common_cuts(chunks: Sequence[Chunks], lengths: Sequence[int]) -> np.ndarray:
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


def document_rows(document: Tokenized, limits: Sequence[int], sides: Sequence[Side], whole: bool) -> list[Row] | str:
    """The rows of a document, or why it has none.

    limits: tokens of a row on each side, BOS left out. whole: only the row that begins where the document does, since
    the rest of a chat would stand without its template; it needs a target.
    """
    if not len(document.ids[0]):
        return NO_TEXT
    if len(document.cuts) == 1:
        without = [side.name for side, (_, _, exact) in zip(sides[1:], document.chunks) if not len(exact)]
        return f"{', '.join(without) or 'all together'}: no chunk in common with the student"
    found = spans(document.cuts, limits)
    if whole:
        found = [span for span in found[:1] if span[0] == 0 and document.targets[0][: document.cuts[span[1], 0]].any()]
    if not found:
        if whole and not document.targets[0].any():
            return NO_TARGET
        return f"{'no target' if whole else 'no chunk'} within data.max_length"
    rows = [make_row(document, span, sides) for span in found]
    if not whole:  # neither an EOS that no longer fits makes a row, nor what the student's vocabulary has no token for
        rows = [row for row in rows if row["num_bytes"]]
    return rows or NO_TEXT


def make_row(document: Tokenized, span: tuple[int, int], sides: Sequence[Side]) -> Row:
    """The columns of the row between two cuts, each side opened by its BOS."""
    low, high = document.cuts[span[0]], document.cuts[span[1]]
    row: Row = {"num_bytes": int(document.widths[0][low[0] : high[0]].sum())}
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
