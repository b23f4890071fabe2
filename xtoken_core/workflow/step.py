"""A step's beginning and end, and the one line of an error that needs no more."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xtoken_core.checksums import is_sealed, seal
from xtoken_core.errors import InputError, RunError, exit_code, full_disk, leave_error
from xtoken_core.processes import end_with, show_log

RUNNER = "XTOKEN_RUNNER"
"""Environment variable: the process id of a program that runs steps on this machine, and takes them along when it ends."""


@contextlib.contextmanager
def step(name: str, *outputs: Any) -> Iterator[Callable[[], dict[str, float]]]:
    """Runs a step's body: says when it begins and ends, and turns bad input, and what a run cannot go on with,
    into one line on stderr and an exit code (`errors`).

    `outputs`: the step's artifacts, whose metadata are given `started` (unix seconds) and `seconds`. On this machine, where a later run
    may take them from its cache, they are sealed in their folder. Yields a function that tells the two so far, for a step that has no
    artifacts.
    """
    start, began = time.time(), time.monotonic()  # the clock may be set meanwhile
    show_log()
    if runner := os.environ.get(RUNNER):
        end_with(int(runner))

    def times() -> dict[str, float]:
        return {"started": round(start, 1), "seconds": round(time.monotonic() - began, 1)}

    print(f"{name}: started", flush=True)
    try:
        yield times
    except (InputError, RunError) as e:
        _stop(e)
    except Exception as e:
        if full := full_disk(e):
            _stop(full)
        raise
    if runner:
        _seal([Path(output.path) for output in outputs])
    for output in outputs:
        output.metadata |= times()
    print(f"{name}: done in {times()['seconds']} s", flush=True)


def _seal(written: Sequence[Path]) -> None:
    """Seals what a step has written side by side and has not sealed by itself."""
    if names := [path.name for path in written if not is_sealed(path)]:
        seal(written[0].parent, names)


def _stop(error: InputError | RunError) -> None:
    print(error, file=sys.stderr, flush=True)
    leave_error(error)
    sys.exit(exit_code(error))
