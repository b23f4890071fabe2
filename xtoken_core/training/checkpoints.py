"""Checkpoints of a training: what they hold, where they lie, which one is resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec

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


def check_inputs(folder: Path, spec: DistillationSpec, modes: dict[str, str], baseline: bool) -> None:
    """Notes in `folder` what its checkpoints are made with. Raises InputError if it holds some of another training."""
    fields = spec.model_dump(mode="json", include={"student", "teachers", "loss", "data", "training"})
    inputs = hashlib.sha256(json.dumps([fields, modes, baseline], sort_keys=True).encode()).hexdigest()
    note = folder / "inputs.sha256"
    if any(folder.glob(f"checkpoint-*/{STATE_FILE}")) and note.exists() and note.read_text() != inputs:
        raise InputError(f"{folder}: holds checkpoints of another spec; remove them, or choose another folder for the run")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(inputs)


def latest_checkpoint(folder: Path, uri: str | None) -> Path | None:
    """The newest complete checkpoint, in `folder` or kept at `uri`."""
    from xtoken_core.storage import folders, local_copy

    def step(name: str) -> int:
        return int(name.rsplit("-", 1)[1])

    local = [str(path.parent) for path in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    kept = [name for name in folders(uri) if name.rsplit("/", 1)[1].startswith("checkpoint-")] if uri else []
    newest = max([*local, *kept], key=step, default=None)
    if newest is None:
        return None
    logger.info("resuming from %s", newest)
    return Path(newest) if newest in local else local_copy(newest)


def restore(checkpoint: Path, out_dir: Path) -> None:
    """Brings back what the run has written beside its checkpoints, where it goes on in an empty folder."""
    for name in ("best", "log.jsonl"):
        kept, place = checkpoint / name, out_dir / name
        if kept.is_dir() and not place.exists():
            shutil.copytree(kept, place)
        elif kept.is_file() and not place.exists():
            shutil.copy(kept, place)


def publish_checkpoint(folder: Path, uri: str | None) -> None:
    """Keeps a checkpoint at `uri`, in place of older ones."""
    if uri is None:
        return
    from xtoken_core.storage import folders, publish, remove

    older = [name for name in folders(uri) if name.rsplit("/", 1)[1].startswith("checkpoint-")]
    publish(folder, f"{uri.rstrip('/')}/{folder.name}")
    for name in older:
        remove(name)
