"""Checkpoints of a training: what they hold, where they lie, which one is resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec
from xtoken_core.storage import folders, local_copy, publish, remove
from xtoken_core.training.inputs import TrainingInputs

logger = logging.getLogger(__name__)

STATE_FILE = "distillation.json"
"""Written last into a checkpoint: one without it is not complete."""

LEARNABLE_FILE = "learnable.safetensors"


@dataclass
class Progress:
    """What a run has to remember beside weights, optimizer and scheduler."""

    scale: float | None = None
    """Dynamic scaling's factor for the next step, from the last step's sums."""
    tokens: int = 0
    """Student tokens trained on so far, over all ranks."""
    best_step: int | None = None
    best_bits_per_byte: float | None = None
    last_bits_per_byte: float | None = None
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("data", "teachers", "student", "validation", "save"), 0.0)
    )
    """By phase, of this rank."""


def check_inputs(folder: Path, spec: DistillationSpec, inputs: TrainingInputs, baseline: bool) -> None:
    """Notes in `folder` what its checkpoints are made with. Raises InputError if it holds some of another training."""
    fields = spec.model_dump(mode="json", include={"student", "teachers", "loss", "data", "training"})
    digest = hashlib.sha256(json.dumps([fields, dict(inputs.modes), baseline], sort_keys=True).encode()).hexdigest()
    note = folder / "inputs.sha256"
    if any(folder.glob(f"checkpoint-*/{STATE_FILE}")) and note.exists() and note.read_text() != digest:
        raise InputError(f"{folder}: holds checkpoints of another spec; remove them, or choose another folder for the run")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(digest)


def load_progress(checkpoint: Path) -> Progress:
    """What a checkpoint remembers of its run."""
    return Progress(**json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))


def step_of(checkpoint: str | Path) -> int:
    """The optimizer step after which a checkpoint was made, from its name."""
    return int(str(checkpoint).rsplit("-", 1)[1])


def latest_checkpoint(folder: Path, uri: str | None) -> Path | None:
    """The newest complete checkpoint, in `folder` or kept at `uri`."""
    local = [str(path.parent) for path in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    kept = [name for name in folders(uri) if name.rsplit("/", 1)[1].startswith("checkpoint-")] if uri else []
    newest = max([*local, *kept], key=step_of, default=None)
    if newest is None:
        return None
    logger.info("resuming from %s", newest)
    return Path(newest) if newest in local else local_copy(newest)


def restore(checkpoint: Path | None, out_dir: Path) -> None:
    """Brings back what the run has written beside its checkpoints, where it goes on in an empty folder.

    Without a checkpoint, removes an earlier run's students: its best would pass for this one's.
    """
    if checkpoint is None:
        for name in ("best", "last"):
            shutil.rmtree(out_dir / name, ignore_errors=True)
        return
    for name in ("best", "log.jsonl"):
        kept, place = checkpoint / name, out_dir / name
        if kept.is_dir() and not place.exists():
            shutil.copytree(kept, place)
        elif kept.is_file() and not place.exists():
            shutil.copy(kept, place)


def complete_checkpoint(folder: Path, out_dir: Path, progress: Progress, uri: str | None) -> None:
    """Adds to a checkpoint what lies beside it, notes the progress last, and keeps it at `uri` in place of older ones."""
    best, log = out_dir / "best", out_dir / "log.jsonl"
    if best.exists():  # with the checkpoint, in case the run goes on elsewhere
        shutil.rmtree(folder / "best", ignore_errors=True)  # of a run that was killed while it saved
        shutil.copytree(best, folder / "best", copy_function=os.link)
    shutil.copy(log, folder / log.name)
    partial = folder / f"{STATE_FILE}.partial"  # so that the file is there whole or not at all
    partial.write_text(json.dumps(asdict(progress)), encoding="utf-8")
    partial.rename(folder / STATE_FILE)
    if uri is not None:
        _keep(folder, uri)


def _keep(folder: Path, uri: str) -> None:
    older = [name for name in folders(uri) if name.rsplit("/", 1)[1].startswith("checkpoint-")]
    publish(folder, f"{uri.rstrip('/')}/{folder.name}")
    for name in older:
        remove(name)
