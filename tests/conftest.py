"""Settings that must be in force before any test module imports anything, and the process that others are forked from."""

from __future__ import annotations

import gc
import os

import pytest

from pipelines.warm import IMPORTED
from xtoken_core.forking import start_server

if not os.path.exists("/dev/nvidiactl"):  # no GPU: the kernels run in Triton's interpreter, if it is told before its import
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["tests.support.examples", "tests.support.faults", "tests.support.state", "tests.support.weed"]


def pytest_collection() -> None:
    """Imports make no garbage worth looking for."""
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the one process that teachers and steps of slow tests are forked from, while the first tests run.

    What has been imported stays: trainers collect garbage again and again, a third of a second each time with all of it.
    """
    gc.freeze()
    gc.enable()
    controller = session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput")
    if controller or not any(item.get_closest_marker("slow") for item in session.items):
        return
    errors, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # where teachers that are meant to fail print why, besides telling their students
    start_server(IMPORTED)
    os.dup2(errors, 2)
