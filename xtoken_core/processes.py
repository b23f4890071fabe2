"""A process and those that it works for: it ends with them, and they see what it logs."""

from __future__ import annotations

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


def _watch(pid: int) -> None:
    try:
        if hasattr(os, "pidfd_open"):
            watched = poll()
            watched.register(os.pidfd_open(pid))
            watched.poll()
        else:
            while True:
                os.kill(pid, 0)
                time.sleep(1)
    except ProcessLookupError:
        pass
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
