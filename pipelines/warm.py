"""Processes as copies of a warm one, which has imported once what a run's steps need."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from types import ModuleType
from typing import TextIO

import psutil

from xtoken_core.forking import start_process, start_server

IMPORTED = [
    "kfp.dsl.executor_main",
    "xtoken_core.training.distill",
    "xtoken_core.evaluation.evaluate",
    "xtoken_core.report.page",
    "xtoken_core.workflow.resolve",
    "xtoken_core.workflow.vocabularies",
]
"""What the warm process imports."""


def fork(target: Callable[..., object], *arguments: object) -> tuple[ForkServerProcess, TextIO]:
    """Starts a function in a copy of the warm process, with this process's environment; returns the copy and all that it prints."""
    start_server(IMPORTED)
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_forked, args=(theirs, dict(os.environ), target, arguments))
    with _no_main():
        start_process(process)
    theirs.close()
    output = os.fdopen(os.dup(ours.fileno()), encoding="utf-8", errors="replace")
    ours.close()
    return process, output


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Hides the main module: Python would import it again in the copy, and a script without a guard would run twice."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _forked(output: Connection, environment: dict[str, str], target: Callable[..., object], arguments: Sequence[object]) -> None:
    """The body of a copy, which is to behave as any other process."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # data loaders start their workers as they always do
    try:
        target(*arguments)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out, and trackers end their runs in


def servers() -> list[psutil.Process]:
    """The processes that serve this one for as long as it lives, and end when it does: the warm one, and Python's resource tracker."""
    return [child for child in psutil.Process().children() if any("from multiprocessing." in part for part in child.cmdline())]
