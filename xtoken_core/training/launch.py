"""A training on every GPU of this host: one process each, which meet in a file, so that no port is open to other hosts."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xtoken_core.errors import InputError, RunError, errors_left_in, full_disk, leave_error, left_error
from xtoken_core.forking import start_process, start_server
from xtoken_core.processes import end_with, show_log
from xtoken_core.training.ranks import MEETING

GRACE = 2.0
"""Seconds between being told to end and being ended, of ranks that are left when one has failed."""

THIS_HOST = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Where the ranks listen for one another, unless the environment names another interface."""


def on_every_gpu(gpus: int, body: Callable[..., Any], arguments: tuple[Any, ...], timeout: float = 900.0) -> Any:
    """Runs `body` in `gpus` processes; returns the first rank's result. Raises the InputError or RunError of the first to fail.

    timeout: seconds that a collective waits for the slowest rank.
    """
    start_server(["xtoken_core.training.distill"])
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="xtoken-ranks-") as folder, errors_left_in(error := Path(folder) / "error"):
        result = context.SimpleQueue()
        world = {MEETING: folder, "WORLD_SIZE": str(gpus), "LOCAL_WORLD_SIZE": str(gpus)}
        environment = THIS_HOST | dict(os.environ) | world
        given = (_Host(os.getpid(), environment, timeout), result, body, arguments)
        ranks = [context.Process(target=_rank, args=(rank, *given), name=f"rank {rank}") for rank in range(gpus)]
        with _ended(ranks):
            for process in ranks:
                start_process(process)
            if (failed := _first_to_fail(ranks)) is not None:
                raise left_error(error) or _died(failed)
            return result.get()


@contextlib.contextmanager
def _ended(ranks: Sequence[ForkServerProcess]) -> Iterator[None]:
    """Ends those that still run afterwards: one that was stopped does not hear SIGTERM."""
    try:
        yield
    finally:
        started = [process for process in ranks if process.pid is not None]
        for end in (lambda process: process.terminate(), lambda process: process.kill()):
            running = [process for process in started if process.is_alive()]
            for process in running:
                end(process)
            for process in running:
                process.join(GRACE)


def _first_to_fail(ranks: Sequence[ForkServerProcess]) -> ForkServerProcess | None:
    """Waits until all ranks have ended well (None) or one has not; of several, one that was killed is the cause."""
    while running := [process for process in ranks if process.is_alive()]:
        wait([process.sentinel for process in running])
        failed = [process for process in ranks if process.exitcode]
        if failed:
            return min(failed, key=lambda process: process.exitcode or 0)
    return next((process for process in ranks if process.exitcode), None)


def _died(process: ForkServerProcess) -> RunError:
    code = process.exitcode or 0
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return RunError(f"{process.name}: its process died ({cause}{', perhaps out of memory' if code == -signal.SIGKILL else ''})")


@dataclass(frozen=True)
class _Host:
    """What the ranks of a host have in common."""

    launcher: int
    """The process that they end with."""
    environment: dict[str, str]
    timeout: float
    """Of a collective, in seconds."""


def _rank(rank: int, host: _Host, result: Any, body: Callable[..., Any], arguments: Any) -> None:
    """The body of a rank's process."""
    os.environ.clear()
    os.environ.update(host.environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    multiprocessing.set_start_method(None, force=True)  # data loaders start their workers as they always do
    show_log()
    end_with(host.launcher)
    try:
        _meet(rank, host.timeout)
        returned = body(*arguments)
        if rank == 0:
            result.put(returned)
    except (InputError, RunError) as e:
        leave_error(e)
        sys.exit(1)
    except Exception as e:
        if full := full_disk(e):
            leave_error(full)
        else:
            traceback.print_exc()
        sys.exit(1)


def _meet(rank: int, timeout: float) -> None:
    """Makes the process group of this host's ranks. torch's store for it would listen on every interface."""
    if on_gpus := torch.cuda.is_available():
        torch.cuda.set_device(rank)
    ranks = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if on_gpus else "gloo",
        store=dist.FileStore(f"{os.environ[MEETING]}/group", ranks),
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
