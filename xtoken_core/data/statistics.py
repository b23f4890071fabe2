"""What prepare read and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from xtoken_core import storage
from xtoken_core.data.documents import Document
from xtoken_core.data.rows import Row, Side
from xtoken_core.errors import InputError
from xtoken_core.results.rows import CorpusCounts, RowsRecord, RowStatistics, TeacherCounts


class Statistics:
    """What was read and what became of it."""

    def __init__(self, sides: Sequence[Side]):
        self.sides = sides
        self.documents = self.rows = self.bytes = 0
        self.dropped: Counter[str] = Counter()
        self.corpora: Counter[str] = Counter()
        self.corpus_bytes: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.chunks: Counter[str] = Counter()
        self.exact: Counter[str] = Counter()

    def add(self, document: Document, dropped: str | None) -> None:
        """Counts a document, and why it was dropped if it was."""
        self.documents += 1
        self.corpora[document.corpus] += 1
        texts = [document.content] if isinstance(document.content, str) else [m["content"] for m in document.content]
        self.corpus_bytes[document.corpus] += sum(len(text.encode()) for text in texts)
        if dropped:
            self.dropped[dropped] += 1

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Counts the rows that pass through."""
        for row in rows:
            self.rows += 1
            self.bytes += row["num_bytes"]
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
            rows=self.rows,
            bytes=self.bytes,
            student_tokens=self.tokens["student"],
            corpora={n: CorpusCounts(documents=count, bytes=self.corpus_bytes[n]) for n, count in self.corpora.items()},
            teachers={
                side.name.removeprefix("teacher "): TeacherCounts(
                    tokens=self.tokens[side.name], chunks=self.chunks[side.name], exact_chunks=self.exact[side.name]
                )
                for side in self.sides[1:]
            },
            **about,
        )


def statistics_of(folder: str) -> RowStatistics:
    """What `prepare_rows` counted when it wrote the rows of `folder` (a path or URI). Raises InputError."""
    path = f"{folder}/rows.json"
    return RowsRecord.parse(storage.open_text(path).read(), path).stats


def all_shards(statistics: Sequence[RowStatistics]) -> RowStatistics:
    """Statistics of several shards as those of one: sums, begun with the first of them."""
    total = _added([part.model_dump() for part in statistics])
    return RowStatistics(**total | {"started": min(part.started for part in statistics)})


def check_statistics(statistics: RowStatistics, where: str) -> None:
    """Raises InputError, with the field `where`, if what `prepare_rows` counted leaves nothing to learn from."""
    documents = statistics.documents
    if not documents:
        raise InputError(f"{where}: no documents")
    if not statistics.rows:
        reason, count = max(statistics.dropped_documents.items(), key=lambda item: item[1])
        raise InputError(f"{where}: no rows: all {documents} documents dropped, {count} since {reason}")
    for teacher, counts in statistics.teachers.items():
        if not counts.chunks:
            raise InputError(f"{where}: teacher {teacher} has no chunk in common with the student")


def _added(parts: Sequence[Any]) -> Any:
    """Numbers added up, through nested dicts; a key may be missing in some."""
    if not isinstance(parts[0], dict):
        return sum(parts)
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: _added([part[key] for part in parts if key in part]) for key in keys}
