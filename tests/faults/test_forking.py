"""The process that others are forked from dies: the next one is started all the same."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

from pipelines import warm

ROOT = Path(__file__).parents[2]

PROGRAM = """
import os, signal, sys
from multiprocessing import forkserver
from pipelines import warm
from tests.faults import test_forking

if __name__ == "__main__":
    warm.IMPORTED[:] = []
    _, output = warm.fork(*((test_forking.in_a_copy,) if sys.argv[1] == "in a copy" else (print, "first")))
    print(output.read())
    if sys.argv[1] == "here":
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        _, output = warm.fork(print, "started")
        print(output.read())
"""


def frozen() -> None:
    print(gc.isenabled(), gc.get_freeze_count(), flush=True)


def test_a_copy_looks_for_no_garbage_in_what_was_imported_for_it():
    _, output = warm.fork(frozen)
    enabled, objects = output.read().split()
    assert enabled == "True" and int(objects) > 100_000


def in_a_copy() -> None:
    """The server of the copy that runs this is killed, and another process is wanted."""
    os.kill(os.getppid(), signal.SIGKILL)
    _, output = warm.fork(print, "started")
    print(output.read(), flush=True)


def test_a_server_that_died_is_started_again(fault):
    """As after the kill of a client that was just asking for a process."""
    for whose in ("here", "in a copy"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, whose], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.stdout.split()[-1] == "started", done.stderr[-2000:]
        fault(f"the process that steps are forked from is killed ({whose})", "another is started", done.stdout.split()[-1])
