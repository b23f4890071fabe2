"""Processes that are forked from one that has imported what they need, as the system sees them."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable

import psutil


def forkservers(parent: int) -> list[psutil.Process]:
    """The processes that a process's teachers or steps are forked from: one, or none before the first."""
    return [child for child in psutil.Process(parent).children() if is_forked(child)]


def forked(parent: int) -> list[psutil.Process]:
    """The teachers of a student, or the steps of a run, in the order in which they started."""
    processes = [process for server in forkservers(parent) for process in server.children()]
    return sorted(processes, key=lambda process: process.create_time())


def stopped(parent: int) -> list[psutil.Process]:
    """The descendants of a process that have been stopped by a signal."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_STOPPED:
                found.append(process)
    return found


def is_forked(process: psutil.Process) -> bool:
    """Whether it is a forkserver or one of its copies, and alive."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE and any("multiprocessing.forkserver" in a for a in process.cmdline())
    return False


def left_in_shared_memory(before: set[str]) -> set[str]:
    """What is new in /dev/shm and stays for a minute: tests that run beside this one have files there for a moment.

    What a living process shares of a GPU is in use, and not left.
    """
    deadline = time.monotonic() + 60
    left = set(os.listdir("/dev/shm")) - before
    while (left := {name for name in left if not _in_use(name)}) and time.monotonic() < deadline:
        time.sleep(0.1)
        left &= set(os.listdir("/dev/shm"))
    return left


def _in_use(name: str) -> bool:
    """Whether a file in /dev/shm is the driver's or torch's for a process that is there: `cuda.shm.USER.PID.NUMBER`, in hexadecimal digits, or `torch_PID_...`."""
    driver, torch = re.match(r"cuda\.shm\.[^.]+\.([0-9a-f]+)\.", name), re.match(r"torch_(\d+)_", name)
    pid = int(driver[1], 16) if driver else int(torch[1]) if torch else None
    return pid is not None and psutil.pid_exists(pid)


def ended(processes: Iterable[psutil.Process], seconds: float = 60.0) -> bool:
    """Whether all processes end in time; one that nobody has reaped yet has ended too."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(_runs(process) for process in processes):
            return True
        time.sleep(0.05)
    return False


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
