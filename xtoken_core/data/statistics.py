"""What prepare read and what became of it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtoken_core import storage
from xtoken_core.data.documents import Document
from xtoken_core.data.records import text_of
from xtoken_core.data.rows import Row, Side
from xtoken_core.errors import InputError, printable
from xtoken_core.results.rows import CorpusCounts, RowsRecord, RowStatistics, TeacherCounts

UNUSABLE_SHARE = 0.5
"""Share of documents that may be unreadable, or refused or rewritten by a template; beyond it something else is wrong."""

MOST_REASONS, LONGEST_REASON = 50, 200
"""Reasons that are told apart, and characters of one: some repeat what the documents say."""

OTHER_REASONS = "other reasons"


class Statistics:
    """What was read and what became of it."""

    def __init__(self, sides: Sequence[Side]):
        self.sides = sides
        self.documents = self.rows = self.bytes = self.cut = self.unusable = 0
        self.examples: dict[str, str] = {}
        """Of each reason the first document that was dropped for it."""
        self._told: set[str] = set()
        self.dropped: Counter[str] = Counter()
        self.corpora: Counter[str] = Counter()
        self.corpus_bytes: Counter[str] = Counter()
        self.domains: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.chunks: Counter[str] = Counter()
        self.exact: Counter[str] = Counter()

    def add(self, document: Document, cut: bool = False) -> None:
        """Counts a document that has rows; cut: its end does not fit."""
        self.documents += 1
        self.cut += cut
        self.corpora[document.corpus] += 1
        self.corpus_bytes[document.corpus] += len(text_of(document.content).encode())

    def drop(self, document: Document, reason: str, unusable: bool) -> None:
        """Counts a document that has no rows. One that is unusable, and not just empty or too long, is told of on stderr.

        Of each reason the first is told of, and kept in `examples`.
        """
        self.add(document)
        reason = printable(reason[:LONGEST_REASON])
        if reason not in self.dropped and len(self.dropped) >= MOST_REASONS:
            reason = OTHER_REASONS
        self.dropped[reason] += 1
        self.unusable += unusable
        if unusable and reason not in self.examples:
            print(printable(f"warning: {document.source}: left out: {reason}"), file=sys.stderr)
        self.examples.setdefault(reason, document.source)

    def tell(self, document: Document, remarks: Iterable[str]) -> None:
        """Tells on stderr what there is to say of a document that has rows; of each kind, the first."""
        for remark in remarks:
            if remark not in self._told and len(self._told) < MOST_REASONS:
                self._told.add(remark)
                print(printable(f"warning: {document.source}: {remark[:LONGEST_REASON]}"), file=sys.stderr)

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Counts the rows that pass through."""
        for row in rows:
            self.rows += 1
            self.bytes += row["num_bytes"]
            if row["domain"]:
                self.domains[row["domain"]] += 1
            for side in self.sides:
                self.tokens[side.name] += len(row[f"{side.column}_ids"])
            for side in self.sides[1:]:
                self.chunks[side.name] += len(row[f"{side.column}_chunk_exact"])
                self.exact[side.name] += int(row[f"{side.column}_chunk_exact"].sum())
            yield row

    def summary(self, **about: float) -> RowStatistics:
        """What was counted so far; `about`: the other fields."""
        return RowStatistics(
            documents=self.documents,
            dropped_documents=dict(self.dropped),
            unusable_documents=self.unusable,
            cut_documents=self.cut,
            rows=self.rows,
            bytes=self.bytes,
            student_tokens=self.tokens["student"],
            corpora={n: CorpusCounts(documents=count, bytes=self.corpus_bytes[n]) for n, count in self.corpora.items()},
            domains=dict(self.domains),
            teachers={
                side.teacher: TeacherCounts(
                    tokens=self.tokens[side.name], chunks=self.chunks[side.name], exact_chunks=self.exact[side.name]
                )
                for side in self.sides[1:]
                if side.teacher is not None
            },
            **about,
        )


def statistics_of(folder: str) -> RowStatistics:
    """What `prepare_rows` counted when it wrote the rows of `folder` (a path or URI). Raises InputError."""
    return _record(folder).stats


def rows_identity(folder: str) -> str:
    """What changes when the rows of `folder` (a path or URI) do, wherever they lie. Raises InputError."""
    return _record(folder).digest


def _record(folder: str) -> RowsRecord:
    path = f"{folder}/rows.json"
    return RowsRecord.parse(storage.open_text(path).read(), path)


def rows_in(folders: Iterable[str | Path]) -> int:
    """Training rows of all shards in `folders` (paths or URIs of what prepare wrote). Raises InputError."""
    return sum(statistics_of(f"{folder}/train").rows for folder in folders)


def all_shards(statistics: Sequence[RowStatistics]) -> RowStatistics:
    """Statistics of several shards as those of one: sums, begun with the first of them."""
    total = _added([part.model_dump() for part in statistics])
    return RowStatistics(**total | {"started": min(part.started for part in statistics)})


def check_statistics(
    statistics: RowStatistics, where: str, examples: Mapping[str, str] | None = None, domains: Iterable[str] = ()
) -> None:
    """Raises InputError, with the field `where`, if what `prepare_rows` counted leaves nothing to learn from, or too little.

    examples: a document for each reason to drop one. domains: those that must have rows.
    """
    documents = statistics.documents
    if not documents:
        raise InputError(f"{where}: no documents")
    reason, count = max(statistics.dropped_documents.items(), key=lambda item: item[1], default=("", 0))
    told = f"{count} since {reason}" + (f" ({examples[reason]})" if examples and reason in examples else "")
    if not statistics.rows:
        raise InputError(f"{where}: no rows: all {documents} documents dropped, {told}")
    if statistics.unusable_documents > UNUSABLE_SHARE * documents:
        raise InputError(f"{where}: {statistics.unusable_documents} of {documents} documents cannot be used, {told}")
    if empty := [domain for domain in domains if domain not in statistics.domains]:
        raise InputError(f"{where}: no rows of the domain {empty[0]}")
    for teacher, counts in statistics.teachers.items():
        if not counts.chunks:
            raise InputError(f"{where}: teacher {teacher} has no chunk in common with the student")


def _added(parts: Sequence[Any]) -> Any:
    """Numbers added up, through nested dicts; a key may be missing in some."""
    if not isinstance(parts[0], dict):
        return sum(parts)
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: _added([part[key] for part in parts if key in part]) for key in keys}
