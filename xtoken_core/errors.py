"""Errors that are one line for the user, and how that line reaches the program that started the process."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xtoken_core.uris import without_keys

ERROR_FILE = "XTOKEN_ERROR_FILE"
"""Environment variable: where a process that stops with one of these errors leaves its line, for the program that started it."""


LONGEST_REASON = 300
"""Characters of what a library says that stand in a line of ours."""


def in_one_line(error: BaseException) -> str:
    """What an exception says, on one line, shortened, and without keys; its kind where it says nothing."""
    return without_keys(" ".join(str(error).split()))[:LONGEST_REASON] or type(error).__name__


def printable(text: str) -> str:
    """The text with what a terminal would obey (escapes, carriage returns, changes of direction) as Python writes it; lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class InputError(ValueError):
    """Bad input from the user: one line that names the field, file or teacher at fault.

    Every command line of the project turns it into that line on stderr and exit code 2; anything else that
    escapes is a failed run (exit code 1) or a bug. Keys in URIs and control characters are left out of it.
    """

    def __init__(self, line: str):
        super().__init__(printable(without_keys(line)))


_NO_SPACE = ("no space left", "disk quota exceeded", "file too large", "inline_container")
"""What libraries say of a full disk that raise errors of their own: safetensors; PyTorch, whose file is shorter than it has written."""


def full_disk(error: Exception, where: str = "a working file") -> InputError | None:
    """The line for a disk that was full, by what it made a library raise; None for another error. where: if the error does not say."""
    numbered = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if not numbered and not any(words in str(error).lower() for words in _NO_SPACE):
        return None
    return InputError(f"{getattr(error, 'filename', None) or where}: {os.strerror(errno.ENOSPC)}")


@contextmanager
def full_disk_in(folder: str | Path) -> Iterator[None]:
    """Turns what a full disk makes of writing to `folder` into the InputError that says so."""
    try:
        yield
    except OSError as e:
        raise full_disk(e, str(folder)) or e from None


class RunError(RuntimeError):
    """A run that cannot go on, though its input was good: one line that says why, and exit code 1."""


class NonFiniteError(RunError):
    """Numbers that are not finite, which nothing may go on with.

    The message says whose: of a training, at which step, and what it can go on from; of a model, on which text.
    """


@contextmanager
def blamed(field: str) -> Iterator[None]:
    """Puts the field or model at fault in front of the line of an InputError or a NonFiniteError."""
    try:
        yield
    except (InputError, NonFiniteError) as e:
        raise _kind(e)(f"{field}: {e}") from None


EXIT_CODES: dict[type[Exception], int] = {InputError: 2, RunError: 1}

KINDS: tuple[type[InputError | RunError], ...] = (InputError, NonFiniteError, RunError)
"""What an error of another process is raised as: the first that it is one of."""


def leave_error(error: InputError | RunError) -> None:
    """Leaves the error's line in the file that the environment names, if it names one and no other process has used it before.

    Where that cannot be written the line is lost to the program that started this one, and no other error takes its place here.
    """
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    partial = Path(f"{path}.{os.getpid()}")
    with suppress(OSError):
        partial.write_text(json.dumps({"kind": _kind(error).__name__, "line": str(error)}), encoding="utf-8")
        with suppress(FileExistsError):
            os.link(partial, path)  # the first of several ranks is the cause
        partial.unlink()


def exit_code(error: InputError | RunError) -> int:
    """What a process ends with for it."""
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def left_error(path: str | Path) -> InputError | RunError | None:
    """The error that a process left in `path`, or None."""
    try:
        left = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return {kind.__name__: kind for kind in KINDS}[left["kind"]](left["line"])


def _kind(error: InputError | RunError) -> type[InputError | RunError]:
    return next(kind for kind in KINDS if isinstance(error, kind))


@contextmanager
def errors_left_in(path: str | Path) -> Iterator[None]:
    """Within, processes that are started leave their error in `path`."""
    before = os.environ.get(ERROR_FILE)
    os.environ[ERROR_FILE] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ[ERROR_FILE]
        else:
            os.environ[ERROR_FILE] = before
