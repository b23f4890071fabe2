"""Vocabularies and projections: the files of the overlap and the projection step."""

from __future__ import annotations

from typing import Any

from xtoken_core.results.record import Record


class Vocabulary(Record):
    """One tokenizer's vocabulary."""

    tokenizer: str
    fingerprint: str
    size: int


class ClassCoverage(Record):
    """Of one class of the student's tokens: how many there are, and how many the teacher has exactly."""

    tokens: int
    covered: int
    share: float


class TeacherVocabulary(Vocabulary):
    """A teacher's vocabulary beside the student's."""

    same_vocabulary: bool
    shared: int
    coefficient: float
    """|A ∩ B| / min(|A|, |B|), over the bytes of tokens."""
    coverage: dict[str, ClassCoverage]
    mode: str
    reason: str


class Matrix(Record):
    """The overlap coefficient of every pair."""

    names: list[str] = []
    coefficient: list[list[float]] = []


class OverlapReport(Record):
    """What the overlap step found."""

    student: Vocabulary
    teachers: dict[str, TeacherVocabulary]
    matrix: Matrix


class TokenizerComparison(Matrix):
    """Any number of tokenizers, each compared with each."""

    fingerprints: list[str]
    sizes: list[int]


class Block(Record):
    """W over a few tokens, as text: `weights` [rows][columns]."""

    rows: list[str]
    columns: list[str]
    weights: list[list[float]]


class Example(Record):
    """How W splits one of the student's tokens: the teacher's pieces with their weights."""

    student: str
    pieces: list[tuple[str, float]]


class JoinedCells(Record):
    """What the training rows have made of the cells of two vocabularies (`partition.seen_together`)."""

    cells: int
    """Of the vocabularies alone."""
    left: int
    """Once those were joined that the rows show together."""
    chunks: int
    """Of the rows, that were looked at."""
    apart: float
    """Share of them whose two first tokens lay in different cells before."""
    apart_left: float
    """And whose do now."""


class ProjectionStats(Record):
    """What a projection W looks like."""

    rows: int
    columns: int
    entries: int
    exact: int
    multi: int
    single_inexact: int
    empty: int
    entries_per_row: dict[str, int]
    """Rows by their number of entries."""
    picture: list[list[float]]
    """Weights summed over a grid of bins: student ids down, teacher ids across."""
    block: Block
    examples: list[Example]
    joined: JoinedCells | None = None
    """None: the cells are those that W was given with, or those of the vocabularies alone."""
    options: dict[str, Any] = {}
    seconds: float | None = None
