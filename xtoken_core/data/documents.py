"""Documents of a corpus, read one at a time: .txt (one document each), .jsonl and .parquet, wherever they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import PurePosixPath
from typing import Any

from xtoken_core.errors import InputError
from xtoken_core.spec import DataSpec
from xtoken_core.storage import expand, filesystem, open_text


@dataclass(frozen=True)
class Document:
    """One text, or one chat."""

    index: int
    """Position in the whole corpus, whatever the shard."""
    corpus: str
    """The .jsonl or .parquet file it is from, without suffix; of a .txt file, the folder that holds it."""
    source: str
    """`file`, `file:line` or `file:row`, for messages."""
    content: Any
    """str, or a list of messages `{"role": str, "content": str}` where `data.format` is messages."""


def read_documents(uris: tuple[str, ...], data: DataSpec, shard: int = 0, shards: int = 1) -> Iterator[Document]:
    """Yields every `shards`-th document of the corpus, from number `shard` on, in a fixed order.

    Raises InputError for what is missing, no UTF-8, no JSON, or lacks the column of `data.text_key` or `data.messages_key`.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_lines, ".parquet": _read_parquet}
    index = count()
    for uri in expand(uris):
        path = PurePosixPath(uri)
        if path.suffix not in readers:
            raise InputError(f"{uri}: not a .txt, .jsonl or .parquet file")
        if path.suffix == ".txt" and data.format == "messages":
            raise InputError(f"{uri}: chats (data.format: messages) come as .jsonl or .parquet")
        corpus = path.parent.name if path.suffix == ".txt" else path.stem
        # The position comes before the content, so that a shard can pass over documents of others without parsing them.
        for source, load in readers[path.suffix](uri, data):
            number = next(index)
            if number % shards == shard:
                yield Document(number, corpus, source, load())


def _read_txt(uri: str, data: DataSpec) -> Iterator[tuple[str, Any]]:
    yield uri, lambda: "".join(_lines(uri))


def _read_lines(uri: str, data: DataSpec) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(uri), 1):
        if line.strip():
            source = f"{uri}:{number}"
            yield source, lambda line=line, source=source: _field(_parse(line, source), source, data)


def _read_parquet(uri: str, data: DataSpec) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    key, where = _key(data)
    fs, path = filesystem(uri)
    try:
        with fs.open(path, "rb") as file:
            table = parquet.ParquetFile(file)
            if key not in table.schema_arrow.names:
                raise InputError(f"{uri}: no column {key!r} ({where})")
            row = count()
            for batch in table.iter_batches(batch_size=1024, columns=[key]):
                for value in batch.column(0):
                    source = f"{uri}:{next(row)}"
                    yield source, lambda value=value, source=source: _checked(value.as_py(), source, data)
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{uri}: cannot be read: {str(e).splitlines()[0]}") from None


def _lines(uri: str) -> Iterator[str]:
    with open_text(uri) as file:
        try:
            yield from file
        except UnicodeDecodeError as e:
            raise InputError(f"{uri}: not UTF-8 text: {e.reason}") from None


def _parse(line: str, source: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as e:
        raise InputError(f"{source}: not JSON: {e.msg}") from None
    if not isinstance(record, dict):
        raise InputError(f"{source}: not a JSON object")
    return record


def _key(data: DataSpec) -> tuple[str, str]:
    return (data.text_key, "data.text_key") if data.format == "text" else (data.messages_key, "data.messages_key")


def _field(record: dict[str, Any], source: str, data: DataSpec) -> Any:
    key, where = _key(data)
    if key not in record:
        raise InputError(f"{source}: no field {key!r} ({where})")
    return _checked(record[key], source, data)


def _checked(value: Any, source: str, data: DataSpec) -> Any:
    """The value, if it is what `data.format` says."""
    if data.format == "text":
        if not _is_text(value):
            raise InputError(f"{source}: {data.text_key!r} is no text")
    elif not isinstance(value, list) or not all(
        isinstance(m, dict) and _is_text(m.get("role")) and _is_text(m.get("content")) for m in value
    ):
        raise InputError(f"{source}: {data.messages_key!r} is no list of messages with a role and a content, both text")
    return value


def _is_text(value: Any) -> bool:
    """Whether it is a str that UTF-8 can write: JSON can hold half a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
