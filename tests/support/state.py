"""A process that runs many tests is, before each of them, as it was before the first."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
from collections.abc import Iterator
from unittest import mock

import pytest


@contextlib.contextmanager
def log_kept() -> Iterator[None]:
    """The library's logger is afterwards as it was: what a command attaches to it writes to a stderr that ends with the call."""
    logger = logging.getLogger("xtoken_core")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    try:
        yield
    finally:
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """Ends with a test what it leaves behind: environment, working directory, log. Random numbers begin anew, whatever ran before."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    with mock.patch.dict(os.environ), contextlib.chdir(os.getcwd()), log_kept():
        yield
