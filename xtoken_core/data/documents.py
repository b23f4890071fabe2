"""Documents of a corpus, read one at a time: .txt (one document each), .jsonl, .parquet and hub data sets, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING

from xtoken_core.data.hub import hub_dataset
from xtoken_core.data.records import (
    Content,
    MissingColumn,
    Refused,
    Unusable,
    columns_read,
    content_of,
    content_of_row,
    has_any,
    parsed_line,
)
from xtoken_core.errors import InputError
from xtoken_core.spec import DataSpec
from xtoken_core.storage import expand, filesystem

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Document:
    """One text, or one chat."""

    index: int
    """Position in the whole corpus, whatever the shard."""
    corpus: str
    """The .jsonl or .parquet file it is from, without suffix; of a .txt file, the folder that holds it."""
    source: str
    """`file`, `file:line` or `file:row`, for messages."""
    content: Content
    """Text, or a Conversation; empty text where it cannot be used."""
    unusable: str = ""
    """Why it cannot be used."""
    part: int = 0
    """Which of the URIs it is from."""


def domain_of_corpus(corpus: str) -> str:
    """The domain that held-out text is of, by the name of its file or folder: `code` of .../code.test.jsonl."""
    return PurePosixPath(corpus).name.partition(".")[0]


def read_documents(uris: Sequence[str], data: DataSpec, shard: int = 0, shards: int = 1) -> Iterator[Document]:
    """Yields every `shards`-th document of the corpus, from number `shard` on, in a fixed order.

    A record that is null or cannot be read comes as an `unusable` document. Raises InputError for what is missing, for a file
    whose first record lacks the columns that `data` names, and for images and audio.
    """
    index = count()
    for part, corpus, records in _files(uris, data):
        first = True
        # The position comes before the content, so that a shard can pass over documents of others without parsing them.
        for source, load in records:
            number = next(index)
            if first or number % shards == shard:
                content, reason = _loaded(source, load, first)
                first = False
            if number % shards == shard:
                yield Document(number, corpus, source, content, reason, part)


def _loaded(source: str, load: Callable[[], Content], first: bool) -> tuple[Content, str]:
    """The content of a document, or why it cannot be used."""
    try:
        return load(), ""
    except Unusable as e:
        if isinstance(e, Refused) or (isinstance(e, MissingColumn) and first):  # then the others lack it too
            raise InputError(f"{source}: {e}") from None
        return "", str(e)


def _files(uris: Sequence[str], data: DataSpec) -> Iterator[tuple[int, str, Iterator[tuple[str, Callable[[], Content]]]]]:
    """Which URI, corpus and records, file after file; a file that several URIs name comes once."""
    readers = {".txt": _read_txt, ".jsonl": _read_lines, ".parquet": _read_parquet}
    seen: set[str] = set()
    for part, uri in enumerate(uris):
        dataset = hub_dataset(uri)
        if dataset is not None:
            yield part, dataset.name, ((source, partial(content_of_row, record, data)) for source, record in dataset.records())
            continue
        for file in expand([uri]):
            path = PurePosixPath(file)
            if file in seen:
                continue
            seen.add(file)
            if path.suffix not in readers:
                raise InputError(f"{file}: not a .txt, .jsonl or .parquet file")
            if path.suffix == ".txt" and data.format == "messages":
                raise InputError(f"{file}: chats (data.format: messages) come as .jsonl or .parquet")
            yield part, path.parent.name if path.suffix == ".txt" else path.stem, readers[path.suffix](file, data)


def _line(line: bytes, data: DataSpec) -> Content:
    return content_of(parsed_line(line), data)


def _row(batch: pa.RecordBatch, number: int, data: DataSpec) -> Content:
    try:
        record = batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        raise Unusable("not UTF-8 text") from None
    except Exception as e:  # dates beyond Python's, unknown time zones: types raise errors of their own, UnknownTimeZoneError too
        raise Unusable(f"a value that Python cannot hold: {type(e).__name__}") from None
    return content_of_row(record, data)


def _read_txt(uri: str, data: DataSpec) -> Iterator[tuple[str, Callable[[], Content]]]:
    def load() -> str:
        with _opened(uri) as file:
            try:
                text = file.read().decode("utf-8-sig")
            except UnicodeDecodeError:
                raise Unusable("not UTF-8 text") from None
        return text.replace("\r\n", "\n").replace("\r", "\n")

    yield uri, load


def _read_lines(uri: str, data: DataSpec) -> Iterator[tuple[str, Callable[[], Content]]]:
    with _opened(uri) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{uri}:{number}", partial(_line, line, data)


def _read_parquet(uri: str, data: DataSpec) -> Iterator[tuple[str, Callable[[], Content]]]:
    import pyarrow as pa
    from pyarrow import parquet

    with _opened(uri) as file:
        try:
            table = parquet.ParquetFile(file)
            columns = [name for name in columns_read(data) if name in table.schema_arrow.names]
            if not has_any(columns, data):
                keys = {
                    name: getattr(data, name)
                    for name in ("text_key", "messages_key")
                    if data.format in ("auto", name.split("_")[0])
                }
                names, fields = " or ".join(map(repr, keys.values())), ", ".join(f"data.{key}" for key in keys)
                raise InputError(f"{uri}: no column {names} ({fields})")
            row = count()
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for number in range(len(batch)):
                    source = f"{uri}:{next(row)}"
                    yield source, partial(_row, batch, number, data)
        except pa.ArrowException as e:
            raise InputError(f"{uri}: cannot be read: {str(e).splitlines()[0]}") from None


@contextmanager
def _opened(uri: str) -> Iterator[IO[bytes]]:
    fs, path = filesystem(uri)
    try:
        with fs.open(path, "rb") as file:
            yield file
    except OSError as e:
        raise InputError(f"{uri}: cannot be read: {str(e).splitlines()[0]}") from None
