"""Rows on disk, and batches of them: documents are tokenized, aligned and cut once, stored as Arrow, read memory-mapped.

Columns of a row (`teacher_I` for each teacher I of another vocabulary; one with the student's vocabulary has none):

    document                          int64   the document's position in the corpus
    num_bytes                         int32   bytes of text
    {student,teacher_I}_ids           int32   tokens, BOS first where the tokenizer has one
    {student,teacher_I}_mask          uint8   1 where the token is a target
    {student,teacher_I}_bytes         uint16  bytes of text under each token
    teacher_I_student_chunk_id        int32   chunk of each student token, -1 outside chunks
    teacher_I_teacher_chunk_id        int32   chunk of each teacher token
    teacher_I_chunk_exact             bool    whether the chunk's bytes are equal on both sides
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from xtoken_core import storage
from xtoken_core.data.chat import ChatTokenizer
from xtoken_core.data.documents import Document, read_documents
from xtoken_core.data.rows import Row, Side, Tokenized, document_rows, load_sides, tokenize_texts
from xtoken_core.errors import InputError
from xtoken_core.spec import DataSpec, DistillationSpec

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

T = TypeVar("T")

BATCH_DOCUMENTS = 64
"""Documents tokenized together."""


# ------------------------------------------------------------------------------------------------------------- writing


def prepare_rows(
    spec: DistillationSpec, folder: str | Path, split: Literal["train", "validation"] = "train", shard: int = 0
) -> dict[str, Any]:
    """Writes the rows of one share of the documents to `folder` (rows.arrow, rows.json) and returns the statistics.

    Shard k of `data.shards` takes documents k, k + shards, ...; all shards together hold the rows that one alone would.
    Validation documents are not sharded. Raises InputError for unreadable or empty input, and where a teacher has no
    chunk in common with the student.
    """
    from tqdm import tqdm

    folder, started = Path(folder), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    sides = load_sides(spec)
    uris, shards = (spec.data.train, spec.data.shards) if split == "train" else (spec.data.validation, 1)
    documents = read_documents(uris, spec.data, shard, shards)
    interval = 0.5 if sys.stderr.isatty() else 15
    stats = Statistics(sides)
    with tqdm(documents, f"preparing {split}", unit=" documents", mininterval=interval, delay=2) as progress:
        rows = _rows(progress, sides, spec.data, stats)
        _write(folder / "rows.arrow", stats.counted(_first(rows, spec.data) if split == "train" else rows), sides)
    seconds = round(time.time() - started, 3)
    result = stats.summary() | {"started": round(started, 1), "seconds": seconds}
    if shards == 1:  # one of several shards may be left without rows; all together may not, see `rows_of_shards`
        check_statistics(result, f"data.{split}")
    record = {"pads": {side.column: side.pad for side in sides}, "stats": result}
    (folder / "rows.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return result


def _rows(documents: Iterable[Document], sides: Sequence[Side], data: DataSpec, stats: Statistics) -> Iterator[Row]:
    """The rows of all documents, in order."""
    tokenize: Callable[[list[Any]], list[Tokenized | str]] = partial(tokenize_texts, sides=sides)
    if data.format == "messages":
        tokenize = chats = ChatTokenizer(sides, data.assistant_only)
        sides = chats.sides
    limits = [data.max_length - (side.bos is not None) for side in sides]
    for batch in _batches(documents, BATCH_DOCUMENTS):
        for document, found in zip(batch, tokenize([document.content for document in batch])):
            rows = found if isinstance(found, str) else document_rows(found, limits, sides, whole=data.format == "messages")
            stats.add(document, dropped=rows if isinstance(rows, str) else None)
            if not isinstance(rows, str):
                yield from ({"document": document.index, **row} for row in rows)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _first(rows: Iterable[Row], data: DataSpec) -> Iterator[Row]:
    """The rows that `data.max_rows` leaves: with packing, as many tokens as would fill so many full rows."""
    used = 0
    for row in rows:
        if data.max_rows is not None and used >= _budget(data):
            return
        used += len(row["student_ids"]) if data.packing else 1
        yield row


def _budget(data: DataSpec) -> int:
    return (data.max_rows or 0) * (data.max_length if data.packing else 1)


def _write(path: Path, rows: Iterable[Row], sides: Sequence[Side]) -> None:
    """Streams rows into an Arrow file."""
    import pyarrow as pa

    schema = _schema(sides)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in _batches(rows, 256):
            columns = [pa.array([row[field.name] for row in batch], field.type) for field in schema]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _schema(sides: Sequence[Side]) -> pa.Schema:
    import pyarrow as pa

    fields = [("document", pa.int64()), ("num_bytes", pa.int32())]
    for side in sides:
        fields += [
            (f"{side.column}_ids", pa.list_(pa.int32())),
            (f"{side.column}_mask", pa.list_(pa.uint8())),
            (f"{side.column}_bytes", pa.list_(pa.uint16())),
        ]
    for side in sides[1:]:
        fields += [
            (f"{side.column}_student_chunk_id", pa.list_(pa.int32())),
            (f"{side.column}_teacher_chunk_id", pa.list_(pa.int32())),
            (f"{side.column}_chunk_exact", pa.list_(pa.bool_())),
        ]
    return pa.schema(fields)


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


# ------------------------------------------------------------------------------------------------------------- reading


def load_rows(*folders: str | Path) -> Dataset:
    """The rows that `prepare_rows` wrote, memory-mapped, as numpy arrays; those of several shards in document order."""
    import datasets

    parts = [datasets.Dataset.from_file(str(Path(folder) / "rows.arrow")) for folder in folders]
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if len(parts) > 1:
        rows = rows.select(np.argsort(rows.with_format("numpy")["document"][:], kind="stable"))
    return rows.with_format("numpy")


def training_rows(data: DataSpec, *folders: str | Path) -> Dataset | PackedRows:
    """The rows to train on: of all shards, no more than `data.max_rows`, packed if `data.packing` says so."""
    rows = load_rows(*folders)
    if data.max_rows is not None:
        cost = row_lengths(rows, "student") if data.packing else np.ones(len(rows), np.int64)
        rows = rows.select(range(int(np.count_nonzero(np.cumsum(cost) - cost < _budget(data)))))
    if not data.packing:
        return rows
    columns = [name.removesuffix("_ids") for name in rows.column_names if name.endswith("_ids")]
    plan = pack(np.stack([row_lengths(rows, column) for column in columns], axis=1), data.max_length)
    return PackedRows(rows, plan[: data.max_rows])


def row_lengths(rows: Dataset, column: str) -> np.ndarray:
    """[rows] int64: tokens of each row on one side, read off Arrow's offsets."""
    import pyarrow.compute as pc

    table = rows.select_columns([f"{column}_ids"]).with_format("arrow")[:]
    return pc.list_value_length(table.column(0)).to_numpy().astype(np.int64)


class PackedRows:
    """A map-style dataset whose items are lists of rows that share a row of the batch."""

    def __init__(self, rows: Dataset, plan: Sequence[Sequence[int]]):
        self.rows, self.plan = rows, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[Row]:
        return [self.rows[i] for i in self.plan[index]]


def pack(lengths: np.ndarray, limit: int, open_bins: int = 64) -> list[list[int]]:
    """Which rows go together: first fit, among the last few bins opened.

    lengths: [rows, sides]. No side of a bin exceeds `limit`. Returns the rows' indices by bin, bins in order of opening.
    """
    bins: list[list[int]] = []
    free = np.zeros((open_bins, lengths.shape[1]), np.int64)  # a ring: bin b has its space at b % open_bins
    for row, need in enumerate(lengths):
        recent = np.arange(max(0, len(bins) - open_bins), len(bins))
        fitting = recent[(free[recent % open_bins] >= need).all(axis=1)]
        if len(fitting):
            chosen = int(fitting[0])
        else:
            chosen = len(bins)
            bins.append([])
            free[chosen % open_bins] = limit
        bins[chosen].append(row)
        free[chosen % open_bins] -= need
    return bins
