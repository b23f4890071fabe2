"""How a local run fares, in a file that other processes read while it runs."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Literal

import psutil

from xtoken_core.errors import InputError
from xtoken_core.results.record import Record

FILE = "status.json"


class Status(Record):
    """What `xtoken status` tells of one run of this machine."""

    name: str
    pid: int
    begun: float
    """Seconds since the machine's boot; of the process, so that another one of the same id is not taken for it."""
    log: str
    tasks: int
    count: int = 0
    """Of the task at work, from 1."""
    task: str = ""
    line: str = ""
    """The last one that it printed."""
    state: Literal["running", "succeeded", "failed", "interrupted"] = "running"
    changed: float = 0.0
    """Unix seconds."""

    @classmethod
    def of_this_process(cls, name: str, log: Path, tasks: int) -> Status:
        """The status of a run that begins."""
        return cls(name=name, pid=os.getpid(), begun=_begun(os.getpid()), log=str(log), tasks=tasks)

    def tell(self, folder: Path, **changes: object) -> Status:
        """The status with changes, after it has been written to `folder` whole."""
        changed = self.model_copy(update=changes | {"changed": time.time()})
        partial = folder / f".{FILE}.{os.getpid()}"
        changed.write(partial)
        partial.replace(folder / FILE)
        return changed

    @property
    def alive(self) -> bool:
        """Whether the process of the run is still there."""
        try:
            return abs(_begun(self.pid) - self.begun) < 1
        except (psutil.Error, ValueError, OverflowError):  # gone, or no number of a process
            return False


def _begun(pid: int) -> float:
    """Of a process, in seconds since the boot: both of psutil's times move when the clock is set, and their difference does not."""
    return psutil.Process(pid).create_time() - psutil.boot_time()


def statuses(runs: Path) -> list[Status]:
    """Those of all runs in the folder `runs`, the last one to change first; one that ended without a word counts as interrupted.

    Of one that cannot be read, as after a power cut, stderr says so.
    """
    found = []
    for path in sorted(runs.glob(f"*/{FILE}")):
        try:
            found.append(Status.read(path))
        except InputError as e:
            print(e, file=sys.stderr)
    lost = [s.model_copy(update={"state": "interrupted"}) if s.state == "running" and not s.alive else s for s in found]
    return sorted(lost, key=lambda status: -status.changed)


def told(status: Status) -> str:
    """One run in a line or two."""
    place = f"step {status.count}/{status.tasks} {status.task}" if status.task else "starting"
    ago = max(0.0, time.time() - status.changed)  # the clock may have been set back
    head = f"{status.name}: {status.state}, {place}" if status.state != "succeeded" else f"{status.name}: succeeded"
    lines = [f"{head}, {ago:.0f} s ago" if ago < 120 else f"{head}, {ago / 60:.0f} min ago"]
    if status.state == "running" and status.line:
        lines.append(f"    {re.sub(r' +', ' ', status.line.strip())}")
    return "\n".join([*lines, f"    log: {status.log}"])
