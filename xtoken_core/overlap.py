"""How much two vocabularies have in common, byte for byte."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from xtoken_core.tokenization import TokenTable


@dataclass(frozen=True)
class Overlap:
    """Byte strings that two vocabularies share, special tokens left out."""

    shared: int
    coefficient: float
    """|A ∩ B| / min(|A|, |B|), over the distinct byte strings of each; 0 if either is empty."""


@dataclass(frozen=True)
class Coverage:
    """Of one class of the student's tokens: how many there are, and how many the teacher has exactly."""

    tokens: int
    covered: int

    @property
    def share(self) -> float:
        """Covered share; an empty class counts as covered."""
        return self.covered / self.tokens if self.tokens else 1.0


Audit = dict[str, Coverage]
"""Coverage of each class of `CLASSES`, in that order."""


def vocabulary_overlap(table_a: TokenTable, table_b: TokenTable) -> Overlap:
    """Overlap coefficient (Szymkiewicz-Simpson) of two vocabularies over token bytes."""
    a, b = table_a.ids_by_bytes.keys(), table_b.ids_by_bytes.keys()
    shared, smaller = len(a & b), min(len(a), len(b))
    return Overlap(shared, shared / smaller if smaller else 0.0)


def _is_all(*categories: str) -> Callable[[str], bool]:
    return lambda text: all(unicodedata.category(c).startswith(categories) for c in text)


_KINDS: dict[str, Callable[[str], bool]] = {
    "whitespace": str.isspace,
    "digits": _is_all("Nd"),
    "punctuation": _is_all("P", "S"),
    "letters": _is_all("L", "M"),
}
CLASSES = (*_KINDS, "other", "single_character", "two_digit_numbers", "three_digit_numbers")
"""Every token is in one of the first five; the last three cut across. One leading space is left out of the text judged."""


def token_classes(token: bytes) -> list[str]:
    """The classes of a token, by its text without one leading space; bytes that are not UTF-8 are `other`."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return ["other"]
    body = text[1:] if text.startswith(" ") and len(text) > 1 else text
    classes = [next((kind for kind, test in _KINDS.items() if test(body)), "other")]
    if len(text) == 1:
        classes.append("single_character")
    if token.isdigit() and len(token) in (2, 3):
        classes.append("two_digit_numbers" if len(token) == 2 else "three_digit_numbers")
    return classes


def audit(student_table: TokenTable, teacher_table: TokenTable) -> Audit:
    """Which share of the student's tokens the teacher has byte for byte, by class."""
    tokens, covered = dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, 0)
    theirs = teacher_table.ids_by_bytes
    for token in student_table.ids_by_bytes:
        for name in token_classes(token):
            tokens[name] += 1
            covered[name] += token in theirs
    return {name: Coverage(tokens[name], covered[name]) for name in CLASSES}


def overlap_matrix(tables: Sequence[TokenTable]) -> np.ndarray:
    """Overlap coefficient of every pair, float64 [N, N], symmetric, with ones on the diagonal."""
    matrix = np.eye(len(tables))
    for i, a in enumerate(tables):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = vocabulary_overlap(a, tables[j]).coefficient
    return matrix
