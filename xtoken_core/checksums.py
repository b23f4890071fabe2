"""Proof that the files of a folder are as they were written."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xtoken_core import storage
from xtoken_core.errors import RunError

FILE = "checksums.json"
"""In the folder that it describes: {name: [bytes, SHA-256]}."""


def seal(folder: Path, names: Iterable[str] | None = None) -> None:
    """Writes what is in `folder` (below `names`, or everything) to the disk for good, and then its checksums.

    Files that reach the disk after their checksums were noted would be found damaged, never taken for whole.
    """
    files = _files(folder, names)
    for path in (*files, *sorted({path.parent for path in files})):
        _sync(path)
    text = json.dumps(dict(zip((path.relative_to(folder).as_posix() for path in files), _digests(files), strict=True)), indent=1)
    write_whole(folder / FILE, text)


def note(path: Path, name: str | None = None) -> None:
    """Seals one more file of a folder that is filled file by file; `name`: the one that the file is about to be given."""
    _sync(path)
    known = _known(path.parent) or {}
    write_whole(path.parent / FILE, json.dumps(known | {name or path.name: _digest(path)}, indent=1))


def is_sealed(folder: Path) -> bool:
    """Whether a folder has its checksums, be they right or wrong."""
    return (folder / FILE).exists()


def is_noted(path: Path) -> bool:
    """Whether a file directly in a sealed folder is as it was written."""
    known = (_known(path.parent) or {}).get(path.name)
    return known is not None and path.is_file() and path.stat().st_size == known[0] and _digest(path) == known


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all, also after a power cut."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder: the name of a file that is missing or not as it was written, or None."""
    if (known := _known(folder)) is None:
        return FILE
    for name, (size, _) in known.items():  # the cheap look first
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return name
    pairs = zip(known.items(), _digests([folder / name for name in known]), strict=True)
    return next((name for (name, before), now in pairs if before != now), None)


def check_whole(path: str | Path) -> None:
    """Raises RunError, and removes the folder, unless what a step wrote is as it was written: then the next run makes it again."""
    if damaged := damage(Path(path)):
        storage.remove(str(path))
        raise RunError(f"{path}: {damaged} is not as it was written; it was removed, and another run makes it again")


def same_files(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    here, there = (sorted(path.relative_to(top) for path in _files(top, None)) for top in (folder, other))
    return here == there and all(filecmp.cmp(folder / name, other / name, shallow=False) for name in here)


def _known(folder: Path) -> dict[str, list[int | str]] | None:
    """What the folder's list says, [bytes, SHA-256] by name; None where there is none that can be read."""
    try:
        known = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return known if all(name and len(told) == 2 for name, told in known.items()) else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _files(folder: Path, names: Iterable[str] | None) -> list[Path]:
    tops = [folder] if names is None else [folder / name for name in names]
    found = (path for top in tops for path in ([top] if top.is_file() else top.rglob("*")))
    return sorted(path for path in found if path.is_file() and path != folder / FILE)


def _digests(files: list[Path]) -> list[list[int | str]]:
    """[bytes, SHA-256] of each file; several are read at a time."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_digest, files))


def _digest(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
