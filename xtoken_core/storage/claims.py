"""One writer at a time: a place is claimed while something is written there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from xtoken_core.errors import InputError
from xtoken_core.storage.places import filesystem, reported

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

REFRESH = 5.0
"""Seconds after which the holder of a claim in an object store writes it again."""

PATIENCE = 20.0
"""Seconds without that, as another process sees them, after which the holder counts as dead. No clocks are compared."""

_locked: set[int] = set()
"""Descriptors of the files whose locks this process holds."""


def _leave_to_the_parent() -> None:
    """In a copy of this process: the locks are not its own. It would keep them beyond the end of a process that is killed."""
    while _locked:
        os.close(_locked.pop())


os.register_at_fork(after_in_child=_leave_to_the_parent)


@contextlib.contextmanager
def claimed(uri: str, doing: str) -> Iterator[Callable[[], None]]:
    """Within, no other process may claim the place. Yields a function that raises InputError where the claim was lost meanwhile.

    Locally, and on volumes that hosts share, the lock of a file beside the place; in an object store an object beside it.
    Either ends with its holder, however that ends. Raises InputError, with `doing` in its line, where another holds it.
    """
    fs, target = filesystem(uri)
    if "memory" in fs.protocol:  # of this process
        yield lambda: None
        return
    beside = f"{os.path.dirname(target)}/.{os.path.basename(target)}.claim"
    taken = InputError(f"{uri}: another run {doing} there just now")
    with _file(beside, uri, taken) if "file" in fs.protocol else _object(fs, beside, uri, taken) as check:
        yield check


@contextlib.contextmanager
def _file(path: str, uri: str, taken: InputError) -> Iterator[Callable[[], None]]:
    with reported(uri):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise taken from None
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
            os.close(descriptor)  # the holder before has removed it meanwhile
    _locked.add(descriptor)
    try:
        yield lambda: None
    finally:
        if descriptor in _locked:  # not in a copy of the holder
            _locked.remove(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(path)
            os.close(descriptor)


@contextlib.contextmanager
def _object(fs: AbstractFileSystem, path: str, uri: str, taken: InputError) -> Iterator[Callable[[], None]]:
    token, over = secrets.token_hex(16), threading.Event()

    def check() -> None:
        with reported(uri):
            if _owner(fs, path) not in (token, None):
                raise taken

    with reported(uri):
        _take(fs, path, token, taken)
    thread = threading.Thread(target=_refresh, args=(fs, path, token, over), name=f"claim of {uri}", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(Exception):
            if _owner(fs, path) == token:
                fs.rm_file(path)


def _take(fs: AbstractFileSystem, path: str, token: str, taken: InputError) -> None:
    """Creates the claim; takes it over from a holder that gives no sign of life, and raises `taken` for one that does.

    Raises OSError for a store where nothing is written in `PATIENCE`.
    """
    seen, since = b"", time.monotonic()
    while True:
        refused: OSError | None = None
        try:  # of stores that do not know the condition the last to write wins
            fs.pipe_file(path, token.encode(), mode="create")
        except OSError as e:  # there already, or an answer that says no
            refused = e
        if _owner(fs, path) == token:
            time.sleep(REFRESH / 10)
            if _owner(fs, path) == token:
                return
        now = _content(fs, path)
        if now is not None and now != seen:
            if seen:
                raise taken
            seen, since = now, time.monotonic()
        elif now is not None and time.monotonic() - since >= PATIENCE:
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(path)
            seen, since = b"", time.monotonic()
        elif refused and now is None and not seen and time.monotonic() - since >= PATIENCE:
            raise refused
        time.sleep(REFRESH / 10)


def _refresh(fs: AbstractFileSystem, path: str, token: str, over: threading.Event) -> None:
    count = 0
    while not over.wait(REFRESH):
        count += 1
        with contextlib.suppress(Exception):  # the next time, or whatever is written meanwhile tells of it
            if _owner(fs, path) in (token, None):
                fs.pipe_file(path, f"{token} {count}".encode())


def _owner(fs: AbstractFileSystem, path: str) -> str | None:
    content = _content(fs, path)
    return None if content is None else content.decode(errors="replace").split(" ")[0]


def _content(fs: AbstractFileSystem, path: str) -> bytes | None:
    """What is there now."""
    fs.invalidate_cache(os.path.dirname(path))
    try:
        return bytes(fs.cat_file(path))
    except FileNotFoundError:
        return None
