"""First tokens: how often a student's and a teacher's token began the same chunk of text.

Prepare counts them over the training rows and stores them beside these, in one file: `NAME.student`, `NAME.teacher` (int32 [P]) and `NAME.count`
(int64 [P]) for each teacher. What two vocabularies cannot tell, text can: see `partition.seen_together`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xtoken_core.errors import InputError, in_one_line

FIRST_TOKENS = "first_tokens.safetensors"
"""The file's name."""
FORMAT = "xtoken-first-tokens-1"

_WAITING = 2**20
"""Chunks that are kept one by one, at most."""


@dataclass(frozen=True, eq=False)
class FirstTokens:
    """Pairs of tokens that began chunks, each once, in ascending order."""

    student: np.ndarray
    """int64 [P]."""
    teacher: np.ndarray
    """int64 [P]."""
    count: np.ndarray
    """int64 [P]: chunks."""

    @classmethod
    def added(cls, parts: Iterable[FirstTokens]) -> FirstTokens:
        """Counts of several parts of a text as those of the whole, in whatever order they come."""
        found = list(parts)
        keys = [part.student << 32 | part.teacher for part in found]
        pairs, place = np.unique(np.concatenate([np.empty(0, np.int64), *keys]), return_inverse=True)
        count = np.zeros(len(pairs), np.int64)
        np.add.at(count, place, np.concatenate([np.empty(0, np.int64), *(part.count for part in found)]))
        return cls(pairs >> 32, pairs & (2**32 - 1), count)


class FirstTokenCounter:
    """Counts the first tokens of chunks, row after row."""

    def __init__(self) -> None:
        self._counted = FirstTokens.added([])
        self._waiting: list[FirstTokens] = []
        self._size = 0

    def add(self, student: np.ndarray, teacher: np.ndarray) -> None:
        """Counts the chunks [C] of a row by what `first_of_chunks` gives of both sides; -1: not to be counted."""
        kept = (student >= 0) & (teacher >= 0)
        self._waiting.append(FirstTokens(student[kept], teacher[kept], np.ones(np.count_nonzero(kept), np.int64)))
        self._size += len(student)
        if self._size > _WAITING:
            self.total()

    def total(self) -> FirstTokens:
        """What was counted so far."""
        self._counted = FirstTokens.added([self._counted, *self._waiting])
        self._waiting, self._size = [], 0
        return self._counted


def first_of_chunks(ids: np.ndarray, chunk_id: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The first token of each chunk of a row, int64 [C]; -1 for a chunk without tokens, and for one whose text is not equal on both sides.

    ids, chunk_id: integers [T], the latter -1 outside chunks. exact: bool [C].
    """
    first = np.full(len(exact), -1, np.int64)
    inside = np.flatnonzero(chunk_id >= 0)[::-1]
    first[chunk_id[inside]] = ids[inside]  # of several tokens the one written last stays
    return np.where(exact, first, -1)


def write_first_tokens(path: Path, counted: Mapping[str, FirstTokens]) -> None:
    """Stores the counts by name."""
    tensors: dict[str, np.ndarray] = {}
    for name, first in counted.items():
        tensors |= {f"{name}.student": first.student.astype(np.int32), f"{name}.teacher": first.teacher.astype(np.int32)}
        tensors[f"{name}.count"] = first.count
    save_file(tensors, path, {"format": FORMAT})


def read_first_tokens(path: Path, name: str) -> FirstTokens:
    """The counts of this name. Raises InputError for a file that is damaged, or has none."""
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise InputError(f"{path}: not first tokens as this version counts them; prepare the rows again")
            parts = [f"{name}.{part}" for part in ("student", "teacher", "count")]
            if absent := sorted({*parts} - {*file.keys()}):
                raise InputError(f"{path}: its {absent[0]} is missing")
            student, teacher, count = (file.get_tensor(part) for part in parts)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: cannot read the first tokens: {in_one_line(e)}") from None
    columns = [column.astype(np.int64) for column in (student, teacher, count) if column.ndim == 1 and column.dtype.kind == "i"]
    if len(columns) < 3 or len({len(column) for column in columns}) > 1 or any((column < 0).any() for column in columns):
        raise InputError(f"{path}: {name}: not pairs of tokens with their counts")
    return FirstTokens(*columns)
