"""What prepare read and what became of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from xtoken_core import storage
from xtoken_core.data.documents import Document
from xtoken_core.data.rows import Row, Side
from xtoken_core.errors import InputError

if TYPE_CHECKING:
    pass


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

    def summary(self) -> dict[str, Any]:
        """JSON-able: counts of documents, rows, bytes, tokens; per teacher its tokens and chunks."""
        return {
            "documents": self.documents,
            "dropped_documents": dict(self.dropped),
            "rows": self.rows,
            "bytes": self.bytes,
            "student_tokens": self.tokens["student"],
            "corpora": {name: {"documents": count, "bytes": self.corpus_bytes[name]} for name, count in self.corpora.items()},
            "teachers": {
                side.name.removeprefix("teacher "): {
                    "tokens": self.tokens[side.name],
                    "chunks": self.chunks[side.name],
                    "exact_chunks": self.exact[side.name],
                    **_means(self.exact[side.name], self.bytes, self.chunks[side.name]),
                }
                for side in self.sides[1:]
            },
        }


def _means(exact: int, num_bytes: int, chunks: int) -> dict[str, float]:
    return {"exact_share": exact / max(chunks, 1), "chunk_bytes_mean": num_bytes / max(chunks, 1)}


def statistics_of(folder: str) -> dict[str, Any]:
    """What `prepare_rows` counted when it wrote the rows of `folder` (a path or URI)."""
    counted: dict[str, Any] = json.loads(storage.open_text(f"{folder}/rows.json").read())["stats"]
    return counted


def all_shards(statistics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of several shards (each as `prepare_rows` returns them) as those of one: sums, with shares and means made anew."""
    total = _added(statistics)
    for counts in total["teachers"].values():
        counts |= _means(counts["exact_chunks"], total["bytes"], counts["chunks"])
    return total | {"started": min(part["started"] for part in statistics)}


def check_statistics(statistics: dict[str, Any], where: str) -> None:
    """Raises InputError, with the field `where`, if what `prepare_rows` counted leaves nothing to learn from."""
    documents = statistics["documents"]
    if not documents:
        raise InputError(f"{where}: no documents")
    if not statistics["rows"]:
        reason, count = max(statistics["dropped_documents"].items(), key=lambda item: item[1])
        raise InputError(f"{where}: no rows: all {documents} documents dropped, {count} since {reason}")
    for teacher, counts in statistics["teachers"].items():
        if not counts["chunks"]:
            raise InputError(f"{where}: teacher {teacher} has no chunk in common with the student")


def _added(parts: Sequence[Any]) -> Any:
    """Numbers added up, through nested dicts; a key may be missing in some."""
    if not isinstance(parts[0], dict):
        return sum(parts)
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: _added([part[key] for part in parts if key in part]) for key in keys}
