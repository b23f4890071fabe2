"""Rows: rows.json, which the prepare step leaves beside them."""

from __future__ import annotations

from xtoken_core.results.record import Record


class CorpusCounts(Record):
    """What one corpus holds."""

    documents: int
    bytes: int


class TeacherCounts(Record):
    """A teacher's tokens and chunks."""

    tokens: int
    chunks: int
    exact_chunks: int
    """Whose bytes are equal on both sides."""


class RowStatistics(Record):
    """What prepare read and what became of it."""

    documents: int
    dropped_documents: dict[str, int]
    """By reason."""
    unusable_documents: int = 0
    """Of them those that cannot be read, or that a template refuses or rewrites."""
    cut_documents: int = 0
    """Conversations whose end does not fit into a row."""
    rows: int
    bytes: int
    student_tokens: int
    corpora: dict[str, CorpusCounts]
    teachers: dict[str, TeacherCounts]
    domains: dict[str, int] = {}
    """Rows of each part of the data that names its domain."""
    started: float = 0.0
    seconds: float = 0.0


class RowsRecord(Record):
    """rows.json, beside the rows."""

    pads: dict[str, int]
    stats: RowStatistics
    digest: str = ""
    """Of rows.arrow."""
