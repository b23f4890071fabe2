"""A run on this machine: the compiled pipeline under `kfp.local`, each task a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml
from kfp import components, local

from components.distill import distill
from pipelines.compiling import compile_spec, compile_sweep, documents
from pipelines.progress import Progress
from pipelines.status import Status
from pipelines.steps import warm_steps
from pipelines.warm import servers
from xtoken_core.checksums import FILE as CHECKSUMS
from xtoken_core.checksums import check_whole
from xtoken_core.errors import ERROR_FILE, InputError, RunError, full_disk_in, left_error
from xtoken_core.report.answer import answer_table
from xtoken_core.report.run import Run
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.shape import CHECKPOINTS
from xtoken_core.workflow.step import RUNNER

SETTINGS = {
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DELAY": "10",
    "TQDM_MININTERVAL": "10",
    "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
}
"""Environment of the steps: their lines arrive as they are printed; libraries' bars become a line now and then, and only where it takes long.
Threads sleep while they wait for one another: beside other work, waiting busily took 2.5 times as long."""

OF_KFP = re.compile(r".+-\d{4}(-\d\d){5}-\d{6}")
"""How KFP names the folder of a run on this machine: by its pipeline and the time."""

GRACE = 10.0
"""Seconds that the processes of a run have to end in by themselves."""


class RunFailed(Exception):
    """A step failed for another reason than bad input; the message names it and the log."""


def run_locally(spec: DistillationSpec, runs: Path) -> Run:
    """Runs a spec's pipeline here and returns what its report was made from.

    `runs`: folder for intermediate results, logs and the cache: a step whose spec, files and code are as in an earlier run
    is not run again. Raises InputError where a step finds bad input, RunFailed where one fails.
    """
    with full_disk_in(runs):
        _run(spec.name, lambda: compile_spec(spec), runs)
    return Run.published(spec.output.uri)


def sweep_locally(variants: Mapping[str, DistillationSpec], runs: Path) -> list[Run]:
    """Runs a sweep's pipeline here and returns its runs; raises as `run_locally`."""
    with full_disk_in(runs):
        _run(next(iter(variants.values())).name, lambda: compile_sweep(variants), runs)
    return [Run.published(spec.output.uri) for spec in variants.values()]


def _run(name: str, compiled: Callable[[], str], runs: Path) -> None:
    runs = runs.absolute()
    root = runs / name
    root.mkdir(parents=True, exist_ok=True)
    log = root / f"{datetime.now():%Y-%m-%d-%H-%M-%S}.log"
    with (
        tempfile.TemporaryDirectory() as scratch,
        log.open("a", encoding="utf-8") as raw,
        _environment(
            {**SETTINGS, ERROR_FILE: f"{scratch}/error", RUNNER: str(os.getpid()), CHECKPOINTS: str(runs / "checkpoints")}
        ),
        warm_steps(),
    ):
        pipeline = for_this_machine(compiled())
        run = components.load_component_from_text(yaml.safe_dump(pipeline))
        local.init(
            local.SubprocessRunner(use_venv=False),
            pipeline_root=str(root),
            enable_caching=True,
            cache_root=str(runs / ".cache"),
        )
        _forget_damaged(root)
        status = Status.of_this_process(name, log, len(pipeline["root"]["dag"]["tasks"]))
        progress = Progress(raw, status)
        progress.say(f"{name}: {status.tasks} steps; everything they print: {os.path.relpath(log)}")
        progress.say(f"curves of the training: tensorboard --logdir {os.path.relpath(root)}")
        try:
            with progress.following():
                run()
        except RuntimeError as e:
            left = left_error(f"{scratch}/error")
            if isinstance(left, InputError):
                raise left from None
            if not progress.status.task:
                raise
            why = left or "the step failed; its last lines are above"
            raise RunFailed(f"{progress.status.task}: {why} (log: {os.path.relpath(log)})") from e


def _forget_damaged(root: Path) -> None:
    """Removes what the steps of earlier runs have written and what is no longer as they wrote it: KFP's cache then makes it again."""
    for run in root.iterdir():
        if not OF_KFP.fullmatch(run.name):  # a user's, who may have changed what a step once wrote
            continue
        for sealed in [*run.glob(f"*/{CHECKSUMS}"), *run.glob(f"*/*/{CHECKSUMS}")]:  # of a step, and of an artifact
            try:
                check_whole(sealed.parent)
            except RunError as e:
                print(e, file=sys.stderr, flush=True)


@contextlib.contextmanager
def ended_by_sigterm(name: str) -> Iterator[None]:
    """Within it, SIGTERM ends the run `name` as Ctrl-C in a terminal does, its processes with it; exit code 143 (128 + 15)."""

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        started = [process for process in psutil.Process().children(recursive=True) if process not in servers()]
        for kill, patience in ((psutil.Process.terminate, GRACE), (psutil.Process.kill, 1.0)):
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    kill(process)
            _, started = psutil.wait_procs(started, patience)
        print(f"{name}: ended by SIGTERM; the next run goes on from what was done", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def kept(spec: DistillationSpec) -> str:
    """What an interrupted run has kept, and how it goes on."""
    every = spec.training.save_steps
    training = (
        f"training from its last checkpoint, of every {every} steps" if every else "training anew: training.save_steps is not set"
    )
    return f"{spec.name}: interrupted; the same command goes on: finished steps are kept, {training}"


def answer(spec: DistillationSpec, run: Run) -> str:
    """Did it help? The table that ends a run, and where things lie."""
    under = spec.output.under
    if run.summary is None:  # a pilot that nothing follows
        return answer_table(run, {"report": under("report.html"), "figures": under("pilot.json")})
    places = {
        "report": under("report.html"),
        "student": under(spec.published_student),
        "logs": under("logs"),
        "talk to it": f"xtoken chat {spec.output.uri}",
    }
    return answer_table(run, places)


def for_this_machine(compiled: str) -> dict[str, Any]:
    """The compiled pipeline with what concerns a cluster alone taken out.

    Training may come from the cache: here nothing but its inputs and the code, which are part of the key, can differ. And
    there is no pre-emption, for which a step would have to be tried again.
    """
    pipeline: dict[str, Any] = documents(compiled)[0]
    executors = pipeline["deploymentSpec"]["executors"]
    for name, task in pipeline["root"]["dag"]["tasks"].items():
        task.pop("retryPolicy", None)
        if executors[f"exec-{name}"]["container"]["args"][-1] == distill.python_func.__name__:
            task["cachingOptions"] = {"enableCache": True}
    for executor in executors.values():
        executor["container"].pop("resources", None)
    return pipeline


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
