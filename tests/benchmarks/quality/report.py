"""One table and one picture from the lab's JSON lines."""

from __future__ import annotations

from pathlib import Path


def write_report(folder: Path, out: Path) -> None:
    """Later."""
    raise NotImplementedError
