"""Command lines as calls in this process: what a user's shell would see, without the seconds that a Python needs to start."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

from components.cli import command, run_command
from pipelines.__main__ import cli


@dataclass(frozen=True)
class Done:
    """What a command line left: as `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


@contextlib.contextmanager
def _log_kept() -> Iterator[None]:
    """The library's logger is afterwards as it was: what a command attaches to it writes to a stderr that ends with the call."""
    logger = logging.getLogger("xtoken_core")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    try:
        yield
    finally:
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def call(program: str, *arguments: object, **environment: str) -> Done:
    """Runs `pipelines` or `components.NAME` as `python -m` does."""
    if program == "pipelines":
        group, name = cli, "python -m pipelines"
    else:
        module = importlib.import_module(program)
        group, name = command(getattr(module, program.rpartition(".")[2])), f"python -m {program}"
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        _log_kept(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, environment),
        mock.patch("sys.argv", [name, *map(str, arguments)]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            run_command(group, name)
        except SystemExit as e:
            code = int(e.code or 0)
    return Done(code, out.getvalue(), err.getvalue())
