"""Rows on disk, and batches of them: documents are tokenized, aligned and cut once, stored as Arrow, read memory-mapped.

Columns of a row (`teacher_I` for each teacher I of another vocabulary; one with the student's vocabulary has none):

    document                          int64   the document's position in the corpus
    part                              int32   which entry of data.train (or data.validation) it is from
    domain                            string  that entry's domain, empty without one; of validation rows, the name of their file
    num_bytes                         int32   bytes of text
    {student,teacher_I}_ids           int32   tokens, BOS first where the tokenizer has one
    {student,teacher_I}_mask          uint8   1 where the token is a target
    {student,teacher_I}_bytes         uint16  bytes of text under each token
    teacher_I_student_chunk_id        int32   chunk of each student token, -1 outside chunks
    teacher_I_teacher_chunk_id        int32   chunk of each teacher token
    teacher_I_chunk_exact             bool    whether the chunk's bytes are equal on both sides

Beside the training rows lies how often two tokens began the same chunk (`first_tokens`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xtoken_core.data.documents import Document, domain_of_corpus, read_documents
from xtoken_core.data.parallel import mapped
from xtoken_core.data.reading import row_budget
from xtoken_core.data.records import text_of
from xtoken_core.data.rows import Row, Side, load_sides
from xtoken_core.data.statistics import Statistics, check_statistics
from xtoken_core.data.tokenizing import DocumentTokenizer, outcomes_by
from xtoken_core.errors import InputError
from xtoken_core.first_tokens import FIRST_TOKENS, FirstTokenCounter, first_of_chunks, write_first_tokens
from xtoken_core.progress import bar
from xtoken_core.results.rows import RowsRecord, RowStatistics
from xtoken_core.spec import DataSpec, DistillationSpec

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_DOCUMENTS = 64
"""Documents tokenized together, at most."""
BATCH_CHARACTERS = 2**22
"""Of these documents, from which on no more join them: their tokens take some thirty times the memory of the text."""

ROWS_AT_ONCE = 256
"""Rows of one Arrow record batch."""


def prepare_rows(
    spec: DistillationSpec,
    folder: str | Path,
    split: Literal["train", "validation"] = "train",
    shard: int = 0,
    sides: Sequence[Side] | None = None,
) -> RowStatistics:
    """Writes the rows of one share of the documents to `folder` (rows.arrow, rows.json, of training rows first_tokens.safetensors).

    Returns the statistics.

    Shard k of `data.shards` takes documents k, k + shards, ...; all shards together hold the rows that one alone would.
    Validation documents are not sharded. `sides`: what `load_sides` gives of the spec, where it is at hand. Raises InputError
    for unreadable or empty input, for a shard that is none, and where a teacher has no chunk in common with the student.
    """
    folder, started, began = Path(folder), time.time(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    sides = load_sides(spec) if sides is None else sides
    uris, shards = (spec.data.train_uris, spec.data.shards) if split == "train" else (spec.data.validation, 1)
    if not 0 <= shard < shards:
        raise InputError(f"shard: {shard} is not one of data.shards, which are 0 to {shards - 1}")
    domains = [part.domain or "" for part in spec.data.parts] if split == "train" else None
    documents = read_documents(uris, spec.data, shard, shards)
    stats = Statistics(sides)
    with bar(f"preparing {split}", iterable=documents, unit=" documents") as read:
        rows = _rows(read, sides, spec, domains, stats)
        if split == "train":
            rows = _first_tokens_counted(_first(rows, spec.data), sides, folder / FIRST_TOKENS)
        _write(folder / "rows.arrow", stats.counted(rows), sides)
    result = stats.summary(started=round(started, 1), seconds=round(time.monotonic() - began, 3))
    if shards == 1:  # one of several shards may be left without rows; all together may not, see `rows_of_shards`
        expected = spec.data.expected_domains if split == "train" else ()
        check_statistics(result, f"data.{split}", stats.examples, expected)
    with (folder / "rows.arrow").open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()[:16]
    RowsRecord(pads={side.column: side.pad for side in sides}, stats=result, digest=digest).write(folder / "rows.json")
    return result


def _rows(
    documents: Iterable[Document], sides: Sequence[Side], spec: DistillationSpec, domains: Sequence[str] | None, stats: Statistics
) -> Iterator[Row]:
    """The rows of all documents, in order. domains: of each part of the data; None: they go by the names of their files."""
    alone = DocumentTokenizer(sides, spec.data).outcomes
    for batch, outcomes in mapped(_together(documents), alone, outcomes_by, (spec,)):
        for document, outcome in zip(batch, outcomes):
            if outcome.dropped is not None:
                stats.drop(document, outcome.dropped, unusable=outcome.unusable)
                continue
            stats.add(document, cut=outcome.cut)
            stats.tell(document, outcome.remarks)
            domain = domain_of_corpus(document.corpus) if domains is None else domains[document.part]
            place = {"document": document.index, "part": document.part, "domain": domain}
            yield from (place | row for row in outcome.rows)


def _together(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in order, those that are tokenized together in one list."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(text_of(document.content))
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _first(rows: Iterable[Row], data: DataSpec) -> Iterator[Row]:
    """The rows that `data.max_rows` leaves: with packing, as many tokens as would fill so many full rows."""
    used = 0
    for row in rows:
        if data.max_rows is not None and used >= row_budget(data):
            return
        used += len(row["student_ids"]) if data.packing else 1
        yield row


def _first_tokens_counted(rows: Iterable[Row], sides: Sequence[Side], path: Path) -> Iterator[Row]:
    """The rows as they are; after the last one the first tokens of their chunks are written.

    With `data.max_rows` each shard writes, and counts, so many rows, of which training leaves some out.
    """
    counters = {side.column: FirstTokenCounter() for side in sides[1:]}
    for row in rows:
        for column, counter in counters.items():
            exact = row[f"{column}_chunk_exact"]
            counter.add(
                first_of_chunks(row["student_ids"], row[f"{column}_student_chunk_id"], exact),
                first_of_chunks(row[f"{column}_ids"], row[f"{column}_teacher_chunk_id"], exact),
            )
        yield row
    if counters:
        write_first_tokens(path, {column: counter.total() for column, counter in counters.items()})


def _write(path: Path, rows: Iterable[Row], sides: Sequence[Side]) -> None:
    """Streams rows into an Arrow file."""
    import pyarrow as pa

    schema, iterator = _schema(sides), iter(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(iterator, ROWS_AT_ONCE)):
            columns = [pa.array([row[field.name] for row in batch], field.type) for field in schema]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _schema(sides: Sequence[Side]) -> pa.Schema:
    import pyarrow as pa

    fields = [("document", pa.int64()), ("part", pa.int32()), ("domain", pa.string()), ("num_bytes", pa.int32())]
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
