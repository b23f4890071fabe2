"""The process that others are forked from, since it has imported what they need: Python's forkserver, one for all of a run."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver

LONGEST_FOLDER = 75
"""Bytes of the path of the folder for temporary files: in it lies the server's socket, whose path may have 107."""


def start_server(modules: Sequence[str]) -> None:
    """Starts the server, which imports `modules`, unless this process has one: its own, or the one that it was forked from.

    The modules must not touch a GPU when they are imported: CUDA does not survive a fork.
    """
    if forkserver.get_inherited_fds() is not None:
        # Python means a copy to use its own server again, hands it what that takes, and yet starts another one
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
        return
    multiprocessing.set_forkserver_preload(list(modules))
    folder = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_FOLDER:
        tempfile.tempdir = "/tmp"
    try:
        forkserver.ensure_running()
    finally:
        tempfile.tempdir = folder
