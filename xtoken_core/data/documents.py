"""Documents of a corpus, read one at a time: .txt (one document each), .jsonl, .parquet and hub data sets, wherever they lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING

from xtoken_core.data.hub import HubDataset, hub_dataset
from xtoken_core.data.records import (
    Content,
    Conversation,
    MissingColumn,
    Refused,
    Unusable,
    columns_read,
    content_of,
    content_of_row,
    has_any,
    named_columns,
    parsed_line,
)
from xtoken_core.errors import InputError, blamed
from xtoken_core.spec import DataSpec, DistillationSpec
from xtoken_core.storage import expand, filesystem
from xtoken_core.uris import is_remote

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
            raise InputError(f"{source}: {e}{e.there if isinstance(e, MissingColumn) else ''}") from None
        return "", str(e)


def check_corpora(spec: DistillationSpec) -> list[str]:
    """Which of the fields `data.train`, `data.validation` and `evaluation.texts` hold chats.

    Looked at are the names of all files, and the first record of each URI. Raises InputError, which names the field, for texts
    that would end a later step and for held-out ones that are trained on.
    """
    chats: dict[str, None] = {}
    told_apart = any(part.weight is not None or part.domain is not None for part in spec.data.parts)
    trained: dict[str, int] = {}
    for number, uri in enumerate(spec.data.train_uris):
        found = _checked("data.train", [uri], spec.data, chats)
        if told_apart and (both := next((name for name in found if name in trained), None)):
            raise InputError(f"data.train.{number}: {both} is in data.train.{trained[both]} too, of another weight or domain")
        trained |= dict.fromkeys(found, number)
    for field, uris in (("data.validation", spec.data.validation), ("evaluation.texts", spec.evaluation.texts)):
        held_out = _checked(field, uris, spec.data, chats)
        if both := next((name for name in held_out if name in trained), None):
            raise InputError(f"{field}: {both} is in data.train too")
    return list(chats)


def _checked(field: str, uris: Sequence[str], data: DataSpec, chats: dict[str, None]) -> dict[str, None]:
    """The files and hub data sets that the URIs name, each under one name; `chats` gets the field if a first record is one."""
    with blamed(field):
        places = [place for _, place in _places(uris, data)]
        for uri in uris:
            first = next(read_documents([uri], data), None)
            if first is not None and isinstance(first.content, Conversation):
                chats[field] = None
    return dict.fromkeys(
        place.key if isinstance(place, HubDataset) else place if is_remote(place) else os.path.realpath(place) for place in places
    )


def _places(uris: Sequence[str], data: DataSpec) -> Iterator[tuple[int, HubDataset | str]]:
    """Which URI, and the hub data set or the files behind it; a file that several URIs name comes once."""
    seen: set[str] = set()
    for part, uri in enumerate(uris):
        dataset = hub_dataset(uri)
        if dataset is not None:
            yield part, dataset
            continue
        for file in expand([uri]):
            suffix = PurePosixPath(file).suffix
            if suffix not in _READERS:
                raise InputError(f"{file}: not a .txt, .jsonl or .parquet file")
            if suffix == ".txt" and data.format == "messages":
                raise InputError(f"{file}: chats (data.format: messages) come as .jsonl or .parquet")
            if file not in seen:
                yield part, file
            seen.add(file)


def _files(uris: Sequence[str], data: DataSpec) -> Iterator[tuple[int, str, Iterator[tuple[str, Callable[[], Content]]]]]:
    """Which URI, corpus and records, file after file."""
    for part, place in _places(uris, data):
        if isinstance(place, HubDataset):
            yield part, place.name, ((source, partial(content_of_row, record, data)) for source, record in place.records())
        else:
            path = PurePosixPath(place)
            yield part, path.parent.name if path.suffix == ".txt" else path.stem, _READERS[path.suffix](place, data)


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
                raise InputError(f"{uri}: no column {names} ({fields}){named_columns(table.schema_arrow.names)}")
            row = count()
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for number in range(len(batch)):
                    source = f"{uri}:{next(row)}"
                    yield source, partial(_row, batch, number, data)
        except pa.ArrowException as e:
            raise InputError(f"{uri}: cannot be read: {str(e).splitlines()[0]}") from None


_READERS = {".txt": _read_txt, ".jsonl": _read_lines, ".parquet": _read_parquet}


@contextmanager
def _opened(uri: str) -> Iterator[IO[bytes]]:
    fs, path = filesystem(uri)
    try:
        with fs.open(path, "rb") as file:
            yield file
    except OSError as e:
        raise InputError(f"{uri}: cannot be read: {str(e).splitlines()[0]}") from None
