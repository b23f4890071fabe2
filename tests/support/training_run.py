"""A run of the trainer on tiny models, prepared by the library itself. As a program: `python -m tests.support.training_run SPEC FOLDER OUT`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.tiny import tiny_model, tiny_run
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.projection import build_projection
from xtoken_core.results.training import TrainingSummary
from xtoken_core.spec import DistillationSpec
from xtoken_core.tokenization import TokenTable, load_tokenizer
from xtoken_core.training.distill import distill
from xtoken_core.training.inputs import TrainingInputs

ROOT = Path(__file__).parents[2]

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


def start(values: dict[str, Any], folder: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    """The same in a process of its own, whose standard error is kept."""
    command = [sys.executable, "-m", "tests.support.training_run", json.dumps(values), str(folder), str(out)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def kill_after_a_checkpoint(process: subprocess.Popen[str], out: Path) -> None:
    """SIGKILL, as soon as the checkpoint of step 2 is there."""
    deadline = time.monotonic() + 200
    while not (out / "checkpoints" / "checkpoint-2" / "distillation.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()


def steps(out: Path) -> list[dict[str, Any]]:
    """The lines of optimizer steps in the log."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "tokens" in line]


def losses(out: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in steps(out)]


if __name__ == "__main__":
    text, base, target = sys.argv[1:]
    run(json.loads(text), Path(base), Path(target))
