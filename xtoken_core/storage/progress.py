"""A progress bar of bytes for fsspec's transfers of many files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from fsspec.callbacks import Callback

from xtoken_core.progress import bar as shown


class _File(Callback):
    """Of one file: its bytes move the bar."""

    def __init__(self, bar: Any):
        super().__init__()
        self.bar = bar

    def relative_update(self, inc: int = 1) -> None:
        self.bar.update(inc)


class _Files(Callback):
    """Of the whole transfer, which counts files and not bytes."""

    def __init__(self, bar: Any):
        super().__init__()
        self.bar = bar

    def branched(self, path_1: str, path_2: str, **kwargs: Any) -> _File:
        return _File(self.bar)


@contextlib.contextmanager
def progress(verb: str, uri: str, size: int) -> Iterator[Callback]:
    """Yields what fsspec's `get` and `put` take as `callback`. `size` is in bytes."""
    with shown(f"{verb} {uri}", total=size, unit="B", unit_scale=True) as bar:
        yield _Files(bar)
        bar.update(max(size - bar.n, 0))  # file systems that report nothing on the way
