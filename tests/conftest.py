"""Settings that must be in force before any test module imports anything, and the process that others are forked from."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from multiprocessing import forkserver

import pytest

if not os.path.exists("/dev/nvidiactl"):  # no GPU: the kernels run in Triton's interpreter, if it is told before its import
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the one process that teachers and steps of slow tests are forked from, while the first tests run."""
    controller = session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput")
    if controller or not any(item.get_closest_marker("slow") for item in session.items):
        return
    with contextlib.suppress(ImportError):  # a GPU machine may lack kfp
        from pipelines.warm import IMPORTED

        multiprocessing.set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()
