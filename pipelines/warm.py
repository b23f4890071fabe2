"""Steps on this machine as copies of one warm process, which has imported once what all of them need.

KFP's SubprocessRunner starts a Python for every step. Its imports take longer than the work of a small step.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TextIO

import psutil
from kfp.dsl import executor_main
from kfp.local import subprocess_task_handler

IMPORTED = [
    "kfp.dsl.executor_main",
    "xtoken_core.training.distill",
    "xtoken_core.evaluation.evaluate",
    "xtoken_core.report.page",
    "xtoken_core.workflow.resolve",
    "xtoken_core.workflow.vocabularies",
]
"""What the warm process imports. None of it may touch a GPU: CUDA does not survive a fork."""


@contextlib.contextmanager
def warm_steps() -> Iterator[None]:
    """Within it, KFP's SubprocessRunner forks its steps from a warm process, which inherits the environment of this moment.

    KFP has no setting for how a step's process is started, so its function for that is replaced meanwhile.
    """
    cold = subprocess_task_handler.run_local_subprocess

    def run(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        if env_vars:  # libraries read some of the environment when they are imported
            return cold(full_command, env_vars)
        return _run_forked(full_command)

    multiprocessing.set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()
    subprocess_task_handler.run_local_subprocess = run
    try:
        yield
    finally:
        subprocess_task_handler.run_local_subprocess = cold


def servers() -> list[psutil.Process]:
    """The processes that serve this one for as long as it lives, and end when it does: the warm one, and Python's resource tracker."""
    return [child for child in psutil.Process().children() if any("from multiprocessing." in part for part in child.cmdline())]


def fork(target: Callable[..., object], *arguments: object) -> tuple[ForkServerProcess, TextIO]:
    """Starts a function in a copy of the warm process, with this process's environment; returns the copy and all that it prints."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_forked, args=(theirs, dict(os.environ), target, arguments))
    process.start()
    theirs.close()
    output = os.fdopen(os.dup(ours.fileno()), encoding="utf-8", errors="replace")
    ours.close()
    return process, output


def _forked(output: Connection, environment: dict[str, str], target: Callable[..., object], arguments: Sequence[object]) -> None:
    """The body of a copy, which is to behave as any other process."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # data loaders start their workers as they always do
    # Python means a copy to fork others from the same warm process, hands it what that takes, and yet starts a new one
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    try:
        target(*arguments)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out, and trackers end their runs in


def _run_forked(full_command: list[str]) -> int:
    """Runs a step as `run_local_subprocess` does: prints what it writes, line by line, and returns its exit code."""
    _, _, _, source, *arguments = full_command  # sh -ec SCRIPT, and what the script is given: see kfp.dsl.component_factory
    process, output = fork(_step, source, arguments)
    with output:
        for line in output:
            print(line, end="")
    print("\n")
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _step(source: str, arguments: list[str]) -> None:
    """What KFP's script does in a shell."""
    os.environ["_KFP_RUNTIME"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ephemeral_component.py"
        program.write_text(source, encoding="utf-8")
        sys.argv = [executor_main.__file__, "--component_module_path", str(program), *arguments]
        executor_main.executor_main()
