"""A process and those that it works for: it ends with them, and they see what it logs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from select import poll

GRACE = 10.0
"""Seconds between being told to end and being ended."""


def end_with(pid: int) -> None:
    """Ends this process when process `pid` is gone, however that one ended: by SIGTERM, and if it still runs then, by SIGKILL."""
    threading.Thread(target=_watch, args=(pid,), name=f"watch of {pid}", daemon=True).start()


def wait_for_end(pid: int) -> None:
    """Returns when process `pid`, which need not be a child, is gone."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "pidfd_open"):
            watched = poll()
            watched.register(os.pidfd_open(pid))
            watched.poll()
        else:  # no Linux
            while True:
                os.kill(pid, 0)
                time.sleep(1)


def _watch(pid: int) -> None:
    wait_for_end(pid)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def show_log() -> None:
    """Shows what the library logs on stderr, one line each. Harmless when repeated."""
    logger = logging.getLogger("xtoken_core")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
