"""Command lines as calls in this process: what a user's shell would see, without the seconds that a Python needs to start."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import warnings
from dataclasses import dataclass
from unittest import mock

from components.cli import command, run_command
from pipelines.__main__ import cli
from tests.support.state import log_kept


@dataclass(frozen=True)
class Done:
    """What a command line left: as `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def call(program: str, *arguments: object, **environment: str) -> Done:
    """Runs `pipelines` or `components.NAME` as `python -m` does."""
    if program == "pipelines":
        group, name = cli, "python -m pipelines"
    else:
        module = importlib.import_module(program)
        group, name = command(getattr(module, program.rpartition(".")[2])), f"python -m {program}"
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        log_kept(),
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
