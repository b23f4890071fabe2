"""The process that others are forked from, since it has imported what they need: Python's forkserver, one for all of a run."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any

LONGEST_FOLDER = 75
"""Bytes of the path of the folder for temporary files: in it lies the server's socket, whose path may have 107."""

ATTEMPTS = 50
"""To start a process where the server is just dying, a tenth of a second apart."""


def start_server(modules: Sequence[str]) -> None:
    """Starts the server, which imports `modules`, unless this process has one: its own, or the one that it was forked from.

    The modules must not touch a GPU when they are imported: CUDA does not survive a fork.
    """
    if forkserver.get_inherited_fds() is not None:
        # Python means a copy to use its own server again, hands it what that takes, and yet starts another one
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
        return
    multiprocessing.set_forkserver_preload(["xtoken_core.preloading.before", *modules, "xtoken_core.preloading.after"])
    _ensure_running()


def _ensure_running() -> None:
    """Starts the server unless it runs; its socket lies in a folder of a short name that only this user can enter."""
    folder = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_FOLDER:
        tempfile.tempdir = "/tmp"
    try:
        forkserver.ensure_running()
    finally:
        tempfile.tempdir = folder


def start_process(process: ForkServerProcess) -> None:
    """Starts a process from the server, once more where the server has died.

    Python's server dies with a client that is killed while it asks for a process.
    """
    for attempt in range(ATTEMPTS):
        try:
            return process.start()
        except (ConnectionError, EOFError, FileNotFoundError):
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.1)
            _renew_server()


def _renew_server() -> None:
    """Starts a new server where the old one has ended; a copy of the old one has an own one from then on."""
    server: Any = forkserver._forkserver
    if vars(server).pop("ensure_running", None) is not None:
        server._inherited_fds = server._forkserver_alive_fd = server._forkserver_address = server._forkserver_pid = None
        multiprocessing.set_forkserver_preload([])
    _ensure_running()
