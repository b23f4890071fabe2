"""A step's beginning, end, and one line for bad input."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xtoken_core.errors import InputError

ERROR_FILE = "XTOKEN_ERROR_FILE"
"""Environment variable: where a step that stops for bad input leaves its line, for the program that started it."""


@contextlib.contextmanager
def step(name: str, *outputs: Any) -> Iterator[Callable[[], dict[str, float]]]:
    """Runs a step's body: says when it begins and ends, and turns bad input into one line on stderr and exit code 2.

    `outputs`: the step's artifacts, whose metadata are given `started` (unix seconds) and `seconds`. Yields a function that
    tells the two so far, for a step that has no artifacts.
    """
    start = time.time()

    def times() -> dict[str, float]:
        return {"started": round(start, 1), "seconds": round(time.time() - start, 1)}

    print(f"{name}: started", flush=True)
    try:
        yield times
    except InputError as e:
        _stop(str(e))
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _stop(f"{e.filename or 'a working file'}: {os.strerror(e.errno)}")
    for output in outputs:
        output.metadata |= times()
    print(f"{name}: done in {times()['seconds']} s", flush=True)


def _stop(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
    if path := os.environ.get(ERROR_FILE):
        Path(path).write_text(line + "\n", encoding="utf-8")
    sys.exit(2)
