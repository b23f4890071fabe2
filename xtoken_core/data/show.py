"""A few rows as every tokenizer sees them, for people to look at before they train."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from xtoken_core.data.documents import read_documents
from xtoken_core.data.rows import Row, Side, load_sides
from xtoken_core.data.tokenizing import DocumentTokenizer
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_LOOKED_AT = 200
"""Documents of which rows are looked for."""


def shown_rows(spec: DistillationSpec, count: int, colour: bool) -> Iterator[str]:
    """Yields the first `count` rows of the training data in every tokenization, as text, and between them what was left out.

    Targets are green, or stand in white brackets without colour; special tokens stand as their names. Raises InputError.
    """
    sides = load_sides(spec)
    names = [teacher.id for teacher in spec.teachers if not teacher.cross_tokenizer]
    tokenize = DocumentTokenizer(sides, spec.data)
    shown = 0
    for number, document in enumerate(read_documents(spec.data.train_uris, spec.data)):
        if shown >= count or number >= _LOOKED_AT:
            break
        [found] = tokenize([document])
        rows = found if isinstance(found, str) else tokenize.rows(document, found)
        yield from () if isinstance(found, str) else (f"{document.source}: {remark}" for remark in found.remarks)
        if isinstance(rows, str):
            yield f"{document.source}: left out: {rows}"
            continue
        for row in rows[: count - shown]:
            shown += 1
            more = f", the first of {len(rows)} rows" if len(rows) > 1 and row is rows[0] else ""
            yield "\n\n".join([f"{document.source}{more}", *(_side(row, side, colour) for side in sides)])
            if names:
                yield f"teacher {', '.join(names)}: reads the student's tokens"
    if not shown:
        raise InputError("data.train: no rows in its first documents")


def _side(row: Row, side: Side, colour: bool) -> str:
    """What one tokenizer reads of a row, under a line of figures."""
    ids, targets = row[f"{side.column}_ids"], row[f"{side.column}_mask"]
    about = f"{side.name}: {len(ids)} tokens, {int(targets.sum())} of them targets"
    if side.column != "student":
        exact = row[f"{side.column}_chunk_exact"]
        about += f", {len(exact)} chunks in common with the student, {int(exact.sum())} of them of the same bytes"
    first, last = (_GREEN, _PLAIN) if colour else ("\u27e6", "\u27e7")
    pieces = []
    for learned, places in groupby(range(len(ids)), key=lambda place: bool(targets[place])):
        text = _spelled(ids[list(places)], side)
        pieces.append(f"{first}{text}{last}" if learned else text)
    return f"{about}\n{''.join(pieces)}"


def _spelled(ids: np.ndarray, side: Side) -> str:
    """The text of tokens, special ones as their names."""
    names = side.tokenizer.convert_ids_to_tokens(ids.tolist())
    spelled = [str(name).encode() if side.table.special[i] else side.table[i] for i, name in zip(ids.tolist(), names)]
    return b"".join(spelled).decode(errors="replace")
