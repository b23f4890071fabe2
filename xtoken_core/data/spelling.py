"""Where the tokens of a rendered chat lie in its text."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xtoken_core.data.templates import Rendering, Unmapped
from xtoken_core.data.words import Words
from xtoken_core.tokenization import TokenTable, encode
from xtoken_core.tokenizer_parts import SPACE, bare_tokenizer

if TYPE_CHECKING:
    from xtoken_core.data.rows import Side


@dataclass(frozen=True)
class _Run:
    """A stretch of a rendering between two special tokens."""

    start: int
    """In characters of the rendering."""
    offset: int
    """In bytes of the normalised rendering."""
    raw: str
    normal: str

    def byte(self, place: int, table: TokenTable) -> int:
        """The byte at which a character of the rendering begins."""
        before = self.raw[: place - self.start]
        return self.offset + len((before if self.raw == self.normal else table.normalize(before)).encode())


@dataclass(frozen=True, eq=False)
class Spelling:
    """A rendering in tokens. Places are bytes of `text`, in which special tokens stand as their names."""

    table: TokenTable
    ids: np.ndarray
    """int32 [T]."""
    starts: np.ndarray
    """int64 [T]: where each token begins; a space that the tokenizer added has no width."""
    ends: np.ndarray
    """int64 [T]."""
    text: bytes
    """The rendering as the tokenizer's normaliser leaves it."""
    runs: list[_Run]
    widths: np.ndarray
    """uint16 [T]: bytes of the messages' words under each token."""

    def offsets(self, start: int, end: int) -> tuple[int, int]:
        """Characters [start, end) of the rendering in bytes."""
        return _byte(self.runs, start, self.table), _byte(self.runs, end, self.table)

    def inside(self, start: int, end: int) -> slice:
        """The tokens that lie in bytes [start, end) with all they cover."""
        first = int(np.searchsorted(self.starts, start, side="left"))
        return slice(first, max(first, int(np.searchsorted(self.ends, end, side="right"))))

    def boundaries(self, part: slice) -> np.ndarray:
        """int64, ascending: where tokens of a part begin and end."""
        return np.union1d(self.starts[part], self.ends[part])

    def count(self, place: int) -> int:
        """Tokens that end at or before a byte."""
        return int(np.searchsorted(self.ends, place, side="right"))

    def end_token(self, end: int) -> int | None:
        """The special token that ends at a character of the rendering, or None."""
        last = self.count(self.offsets(end, end)[1]) - 1
        return last if last >= 0 and self.table.special[self.ids[last]] and self.ends[last] == self.offsets(end, end)[1] else None

    def is_plain(self, start: int, end: int) -> bool:
        """Whether no special token lies in characters [start, end)."""
        return not self.table.special[self.ids[self.inside(*self.offsets(start, end))]].any()


class Speller:
    """Tokenizes renderings of one side."""

    def __init__(self, side: Side):
        self.tokenizer, self.table = side.tokenizer, side.table
        decoder = side.tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._ids = {token.content: i for i, token in decoder.items() if side.table.special[i]}
        names = sorted(map(re.escape, self._ids), key=len, reverse=True)
        self.specials = re.compile("|".join(names) if names else "(?!)")
        """Finds names of special tokens."""

    def spell(self, rendering: Rendering, words: Sequence[Words], said: str) -> Spelling:
        """The rendering in tokens, as the tokenizer itself gives them; a special token's name in a message's words stays text.

        said: all that the conversation holds. Raises Unmapped where tokens and text do not fit together.
        """
        text, table = rendering.text, self.table
        spans = sorted((place, place + len(words[i].text)) for i, place in rendering.places.items())
        found = list(self.specials.finditer(text))
        written = len(self.specials.findall(said))
        names = [m for m in found if not (written and any(start <= m.start() and m.end() <= end for start, end in spans))]
        if len(found) - len(names) != written:
            raise Unmapped("a message holds the name of a special token, and its place in the rendering is not known")
        ids = self._ids_of(text) if len(names) == len(found) else self._ids_with_names_as_text(text, names)
        special = np.flatnonzero(table.special[ids])
        if [self._ids[m[0]] for m in names] != ids[special].tolist():
            raise Unmapped("its tokenizer lacks characters of it, or finds other special tokens in it than the template puts")
        starts, ends, runs, pieces, offset = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64), [], [], 0
        cursor = first = 0
        for number in range(len(names) + 1):
            until, last = (names[number].start(), int(special[number])) if number < len(names) else (len(text), len(ids))
            raw = text[cursor:until]
            run = _Run(cursor, offset, raw, table.normalize(raw) if raw else raw)
            widths, lead = _widths(table, ids[first:last], run.normal)
            ends[first:last] = offset + lead + np.cumsum(widths)
            starts[first:last] = ends[first:last] - widths
            runs.append(run)
            pieces.append(run.normal.encode())
            offset += len(pieces[-1])
            if number < len(names):
                pieces.append(names[number][0].encode())
                starts[last], ends[last] = offset, offset + len(pieces[-1])
                offset, cursor, first = int(ends[last]), names[number].end(), last + 1
        covered = np.array([[_byte(runs, start, table), _byte(runs, end, table)] for start, end in spans], np.int64).reshape(
            -1, 2
        )
        return Spelling(table, ids, starts, ends, b"".join(pieces), runs, _overlap(starts, ends, covered))

    def _ids_of(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)

    def _ids_with_names_as_text(self, text: str, names: Sequence[re.Match[str]]) -> np.ndarray:
        """The ids where only `names` are special tokens: text between them is encoded by itself, which comes to the same."""
        cuts = [0, *(place for m in names for place in m.span()), len(text)]
        runs = [text[a:b] for a, b in zip(cuts[::2], cuts[1::2])]
        encoded = encode(self.tokenizer, runs)
        if self.table.dummy_prefix and not self.table.dummy_after_special:  # a blank before the first alone
            written = [self.table.normalize(run).replace(" ", SPACE) for run in runs[1:]]
            encoded[1:] = [found.ids for found in bare_tokenizer(self.tokenizer).encode_batch(written)]
        ids = list(encoded[0])
        for name, run in zip(names, encoded[1:]):
            ids += [self._ids[name[0]], *run]
        return np.array(ids, np.int32)


def _byte(runs: Sequence[_Run], place: int, table: TokenTable) -> int:
    """The byte at which a character of the rendering begins; within a special token's name, that of the name."""
    return runs[bisect_right(runs, place, key=lambda run: run.start) - 1].byte(place, table)


def _widths(table: TokenTable, ids: np.ndarray, normal: str) -> tuple[np.ndarray, int]:
    """Bytes under each token of a stretch of text (int64), and the bytes before the first, which a special token has swallowed."""
    widths = table.lengths[ids].astype(np.int64)
    spelled, wanted = table.decode(ids), normal.encode()
    if spelled == wanted:
        return widths, 0
    if table.dummy_prefix and spelled == b" " + wanted:
        widths[0] -= 1
        return widths, 0
    for kept in (normal.lstrip(), normal.rstrip(), normal.strip()):  # specials that strip the text beside them
        if spelled == kept.encode():
            return widths, normal.encode().index(kept.encode()) if kept else 0
    raise Unmapped("its tokenizer does not spell the text of it")


def _overlap(starts: np.ndarray, ends: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """uint16 [T]: bytes of each token that lie in one of the ascending, disjoint spans [S, 2]."""
    if not len(spans):
        return np.zeros(len(starts), np.uint16)
    sizes = spans[:, 1] - spans[:, 0]
    before = np.concatenate([[0], np.cumsum(sizes)])

    def covered(places: np.ndarray) -> np.ndarray:
        index = np.searchsorted(spans[:, 0], places, side="right")
        last = np.maximum(index - 1, 0)
        partial = np.minimum(places - spans[last, 0], sizes[last])
        return np.where(index > 0, before[last] + partial, 0)

    return (covered(ends) - covered(starts)).astype(np.uint16)
