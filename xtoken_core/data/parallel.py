"""Work on a stream of items by several processes, its results in the order of the items."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from xtoken_core.errors import RunError
from xtoken_core.forking import start_server
from xtoken_core.processes import end_with

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 8.0
"""Seconds of work before other processes are started: they take about as long to begin."""

MOST = 16
"""Processes at most: beyond, the one that reads and writes is what the others wait for."""


def usable_cores() -> int:
    """Cores that this process may use: of its affinity, and no more than its container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no control group of version 2, or no limit ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def mapped(
    items: Iterable[T], work: Callable[[T], R], make: Callable[..., Callable[[T], R]], arguments: tuple[Any, ...]
) -> Iterator[tuple[T, R]]:
    """Every item with the result of `work` on it, in order.

    Short work is done in this process; from `PATIENCE` on, several do it, each with `make(*arguments)`, which gives the same
    function. Items are taken a few ahead only, and none after the iterator is closed. `make`, arguments, items and results cross
    process boundaries. Raises what `work` raises, and RunError if a process dies.
    """
    iterator, cores, started = iter(items), min(usable_cores(), MOST), time.monotonic()
    for item in iterator:
        yield item, work(item)
        if cores > 1 and time.monotonic() - started > PATIENCE:
            break
    else:
        return
    yield from _spread(iterator, cores, make, arguments)


def _spread(
    items: Iterator[T], processes: int, make: Callable[..., Callable[[T], R]], arguments: tuple[Any, ...]
) -> Iterator[tuple[T, R]]:
    start_server(["xtoken_core.data.tokenizing"])
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(os.getpid(), make, arguments)) as pool:
        ahead: deque[tuple[T, Future[R]]] = deque()
        try:
            for item in items:
                ahead.append((item, pool.submit(_do, item)))
                if len(ahead) > 2 * processes:
                    first, result = ahead.popleft()
                    yield first, result.result()
            for first, result in ahead:
                yield first, result.result()
        except BrokenProcessPool:  # of a result, or of the next item to give away
            raise RunError("a process that prepares rows died, perhaps out of memory") from None
        finally:
            for _, future in ahead:
                future.cancel()


_work: Callable[[Any], Any]


def _begin(parent: int, make: Callable[..., Callable[[T], R]], arguments: tuple[Any, ...]) -> None:
    global _work
    end_with(parent)  # which may be killed; the executor's processes would wait for its next item for ever
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken by processes
    _work = make(*arguments)


def _do(item: Any) -> Any:
    return _work(item)
