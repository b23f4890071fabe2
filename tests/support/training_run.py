"""A run of the trainer on tiny models, prepared by the library itself, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState

from pipelines.warm import fork
from tests.support.ports import free_ports
from tests.support.tiny import tiny_model, tiny_run
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.projection import build_projection
from xtoken_core.results.training import TrainingSummary
from xtoken_core.spec import DistillationSpec
from xtoken_core.tokenization import TokenTable, load_tokenizer
from xtoken_core.training.distill import distill
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.training.trainer import DistillationTrainer

OTHER_IDS = 300

FIVE_STEPS = {
    "max_steps": 5,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "save_steps": 2,
    "eval_steps": 2,
    "scheduler": "constant",
}
"""A training section with a checkpoint to resume from."""


def prepare(folder: Path, teachers: int = 2, **sections: dict[str, Any]) -> dict[str, Any]:
    """A tiny run's spec, its rows in `folder/rows` and W in `folder/w.safetensors`. `sections` change the spec, by section."""
    values = changed(tiny_run(folder, teachers), **sections)
    tiny_model(folder / "other", OTHER_IDS, seed=1)  # shorter tokens than the student's, so that W has rows of several entries
    spec = DistillationSpec.model_validate(values)
    for split in ("train", "validation"):
        prepare_rows(spec, folder / "rows" / split, split)
    student, teacher = (load_tokenizer(str(folder / name)) for name in ("student", "other"))
    tables = [TokenTable.from_tokenizer(tokenizer) for tokenizer in (student, teacher)]
    w = build_projection(student, teacher, spec.teachers[0].projection)
    w.save(folder / "w.safetensors", *(table.fingerprint for table in tables))
    return values


def changed(values: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """The spec with some fields changed."""
    return values | {name: values.get(name, {}) | section for name, section in sections.items()}


def run(values: dict[str, Any], folder: Path, out: Path, **options: Any) -> TrainingSummary:
    """Distils; returns the summary."""
    spec = DistillationSpec.model_validate(values)
    inputs = TrainingInputs((folder / "rows",), {"other": "p_kl"}, {"other": folder / "w.safetensors"})
    return distill(spec, inputs, out, **options)


@dataclass(frozen=True)
class Started:
    """A training in a process of its own, which is forked from the tests' server."""

    process: ForkServerProcess
    output: TextIO

    def finish(self) -> str:
        """Waits for the end; what was printed. Raises AssertionError unless it succeeded."""
        printed = self.output.read()
        self.process.join()
        assert self.process.exitcode == 0, printed[-3000:]
        return printed


def start(values: dict[str, Any], folder: Path, out: Path, **environment: str) -> Started:
    """The same in a process of its own. Options of `distill` are those of `run`."""
    with mock.patch.dict(os.environ, environment):
        return Started(*fork(run, values, folder, out))


def standing(steps: int) -> Callable[..., Any]:
    """A trainer's `compute_loss` that stands still, for ever, when its training has done so many steps itself."""
    forward, begun = DistillationTrainer.compute_loss, list[int]()

    def stand(trainer: DistillationTrainer, *arguments: Any, **options: Any) -> Any:
        begun.append(trainer.state.global_step)
        while trainer.state.global_step >= begun[0] + steps:
            time.sleep(1)
        return forward(trainer, *arguments, **options)

    return stand


def stands_still(steps: int, call: Callable[..., object], *arguments: object) -> None:
    """A call whose training stands still after so many steps: one that is to be killed, however late the kill comes."""
    with mock.patch.object(DistillationTrainer, "compute_loss", standing(steps)):
        call(*arguments)


def start_and_kill(values: dict[str, Any], folder: Path, out: Path, **environment: str) -> None:
    """Starts it, and ends it by SIGKILL in the step after the one after the checkpoint of step 2."""
    with mock.patch.dict(os.environ, environment):
        process, _ = fork(stands_still, 3, run, values, folder, out)
    while 3 not in [step for step, *_ in losses(out)]:
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()


def start_ranks(values: dict[str, Any], folder: Path, out: Path, size: int = 2) -> list[Started]:
    """The same on several ranks of one machine, which meet as torchrun would have them."""
    [port] = free_ports(1)
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    started = []
    for rank in range(size):
        with mock.patch.dict(os.environ, {"RANK": str(rank), "LOCAL_RANK": str(rank), **world}):
            started.append(Started(*fork(run_with_fsdp_on_cpu, values, folder, out)))
    return started


def run_with_fsdp_on_cpu(values: dict[str, Any], folder: Path, out: Path) -> None:
    """`run`, where accelerate shards the student on a CPU as on GPUs: by itself it takes fsdp for DDP there, without a word."""
    make = AcceleratorState.__init__

    def made(state: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        make(state, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.object(AcceleratorState, "__init__", made):
        run(values, folder, out)


def steps(out: Path) -> list[dict[str, Any]]:
    """The lines of optimizer steps in the log; none before there is one."""
    log = out / "log.jsonl"
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""  # one may just be written
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line for line in lines if "tokens" in line]


def losses(out: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in steps(out)]
