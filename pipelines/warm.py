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
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

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


def _run_forked(full_command: list[str]) -> int:
    """Runs a step as `run_local_subprocess` does: prints what it writes, line by line, and returns its exit code."""
    _, _, _, source, *arguments = full_command  # sh -ec SCRIPT, and what the script is given: see kfp.dsl.component_factory
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_step, args=(theirs, source, arguments, dict(os.environ)))
    process.start()
    theirs.close()
    with os.fdopen(os.dup(ours.fileno()), encoding="utf-8", errors="replace") as lines:
        for line in lines:
            print(line, end="")
    ours.close()
    print("\n")
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _step(output: Connection, source: str, arguments: list[str], environment: dict[str, str]) -> None:
    """The body of a step's process: what KFP's script does in a shell."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    multiprocessing.set_start_method(None, force=True)  # data loaders start their workers as in any other process
    os.environ.clear()
    os.environ.update(environment, _KFP_RUNTIME="true")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ephemeral_component.py"
        program.write_text(source, encoding="utf-8")
        sys.argv = [executor_main.__file__, "--component_module_path", str(program), *arguments]
        try:
            executor_main.executor_main()
        finally:
            atexit._run_exitfuncs()  # which multiprocessing leaves out, and trackers end their runs in
