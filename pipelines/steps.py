"""KFP's SubprocessRunner with steps that start warm.

By itself it starts a Python for every step. Its imports take longer than the work of a small step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kfp.dsl import executor_main
from kfp.local import subprocess_task_handler

from pipelines.warm import IMPORTED, fork
from xtoken_core.forking import start_server


@contextlib.contextmanager
def warm_steps() -> Iterator[None]:
    """Within it, steps are forked from a warm process, which is started with the environment of this moment.

    KFP has no setting for how a step's process is started, so its function for that is replaced meanwhile.
    """
    cold = subprocess_task_handler.run_local_subprocess

    def run(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        if env_vars:  # libraries read some of the environment when they are imported
            return cold(full_command, env_vars)
        return _run_forked(full_command)

    start_server(IMPORTED)
    subprocess_task_handler.run_local_subprocess = run
    try:
        yield
    finally:
        subprocess_task_handler.run_local_subprocess = cold


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
