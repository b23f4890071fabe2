"""Checkpoints of a training: what they hold, where they lie, which one is resumed."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from xtoken_core.checksums import FILE as CHECKSUMS
from xtoken_core.checksums import damage, is_sealed, seal, write_whole
from xtoken_core.data.statistics import rows_identity
from xtoken_core.errors import InputError
from xtoken_core.identity import identity
from xtoken_core.spec import DistillationSpec
from xtoken_core.storage import claimed, clear_leftovers, folders, is_remote, local_copy, publish, remove
from xtoken_core.training.inputs import TrainingInputs

logger = logging.getLogger(__name__)

STATE_FILE = "distillation.json"
"""`Progress`, in every checkpoint. The checksums are written last: a checkpoint without them is not complete."""

LEARNABLE_FILE = "learnable.safetensors"

KEPT = 2
"""Checkpoints that are kept: should the newest be damaged, there is the one before."""


@dataclass
class Progress:
    """What a run has to remember beside weights, optimizer and scheduler."""

    scale: float | None = None
    """Dynamic scaling's factor for the next step, from the last step's sums."""
    tokens: int = 0
    """Student tokens trained on so far, over all ranks."""
    skipped: int = 0
    """Steps without an update, since their numbers were not finite."""
    best_step: int | None = None
    best_bits_per_byte: float | None = None
    last_bits_per_byte: float | None = None
    teacher_bits: dict[str, dict[str, float]] = field(default_factory=dict)
    """Bits per byte of the validation text by teacher and domain, of those that may fall silent: measured once."""
    silent: dict[str, list[str]] = field(default_factory=dict)
    """By teacher the domains on which it is not heard until the next validation."""
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("data", "teachers", "student", "validation", "save"), 0.0)
    )
    """By phase, of this rank."""


@contextmanager
def owned(*places: str | Path | None) -> Iterator[None]:
    """Within, no other run may use these folders and URIs for checkpoints. Raises InputError where one does."""
    with ExitStack() as held:
        for place in places:
            if place is not None:
                held.enter_context(claimed(str(place), "keeps its checkpoints"))
        yield


NEUTRAL = {"timeout", "skip_nonfinite", "log_steps", "save_steps", "report_to"}
"""Fields of the training section that change nothing about the student: with others of them a training goes on."""


def training_identity(spec: DistillationSpec, inputs: TrainingInputs, baseline: bool) -> str:
    """What a training's checkpoints are made with: the part of the spec that it reads, its rows, and the loss modes. Raises InputError."""
    fields = spec.model_dump(mode="json", include={"student", "teachers", "loss", "data", "training"})
    fields["training"] = {name: value for name, value in fields["training"].items() if name not in NEUTRAL}
    rows = [rows_identity(f"{shard}/train") for shard in inputs.rows]
    return identity(fields, rows, dict(inputs.modes), baseline)


def check_folder(out_dir: Path) -> None:
    """Raises InputError for students or checkpoints that no training of this project has left there: this one would replace them."""
    if is_sealed(out_dir) or (out_dir / "checkpoints" / "identity").exists():
        return
    for path in (out_dir / "best", out_dir / "last", *out_dir.glob("checkpoints/checkpoint-*")):
        if path.exists():
            raise InputError(
                f"{path}: is there already, and no training of this project has made it; choose another folder for the run"
            )


def check_inputs(folder: Path, own: str) -> None:
    """Notes in `folder` the identity of its checkpoints. Raises InputError if it holds some of another training."""
    note = folder / "identity"
    if any(folder.glob(f"checkpoint-*/{CHECKSUMS}")) and note.exists() and note.read_text() != own:
        raise InputError(
            f"{folder}: holds checkpoints of another spec or of other rows; remove them, or choose another folder for the run"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(note, own)


def load_progress(checkpoint: Path) -> Progress:
    """What a checkpoint remembers of its run."""
    return Progress(**json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))


def step_of(checkpoint: str | Path) -> int:
    """The optimizer step after which a checkpoint was made, from its name."""
    return int(str(checkpoint).rsplit("-", 1)[1])


def latest_checkpoint(folder: Path, uri: str | None) -> Path | None:
    """The newest checkpoint that is whole, in `folder` or kept at `uri`; of a damaged one the log says so."""
    for name in sorted([*_local(folder), *_kept(uri)], key=step_of, reverse=True):
        checkpoint = local_copy(name)
        if (damaged := damage(checkpoint)) is None:
            logger.info("resumes at step %d, from %s", step_of(name), name)
            return checkpoint
        logger.warning("%s is damaged (%s is not as it was written); the one before is used", name, damaged)
    logger.info("no checkpoint found in %s%s", uri or folder, _others(uri))
    return None


def checkpoint_of_step(folder: Path, uri: str | None, step: int) -> Path:
    """The checkpoint that the first rank goes on from, as this rank's host has it."""
    names = [name for name in (*_local(folder), *_kept(uri)) if step_of(name) == step]
    return local_copy(names[0])


def _local(folder: Path) -> list[str]:
    return _checkpoints(str(path.parent) for path in folder.glob(f"*/{CHECKSUMS}"))


def _checkpoints(names: Iterable[str]) -> list[str]:
    """Those of the names that are a checkpoint's, oldest first; a user may have put a copy of one beside it."""
    return sorted((name for name in names if re.fullmatch(r"checkpoint-\d+", name.rsplit("/", 1)[-1])), key=step_of)


def newest_checkpoint(folder: Path) -> str:
    """The newest complete checkpoint in `folder`, for messages; `none` without one."""
    return max(_local(folder), key=step_of, default="none")


def _others(uri: str | None) -> str:
    """Names the checkpoints of other settings beside `uri`."""
    if uri is None:
        return ""
    root, _, own = uri.rstrip("/").rpartition("/")
    others = [name for name in folders(root) if name.rsplit("/", 1)[1] != own and _kept(name)] if root else []
    return "".join(f"; {name} holds some of other settings" for name in others)


def _kept(uri: str | None) -> list[str]:
    """The checkpoints at `uri`, oldest first."""
    return _checkpoints(folders(uri)) if uri else []


def clean_up(folder: Path, uri: str | None, used: Path | None) -> None:
    """Removes, here and at `uri`, what a run that goes on from `used` will write again, and what one that was killed has left half.

    That are unfinished checkpoints, and later ones, which are damaged: by their numbers they would count as the newest, and stay in
    place of those that this run makes.
    """
    if uri is not None:
        clear_leftovers(uri)
    made = _checkpoints(map(str, folder.glob("checkpoint-*")))
    unfinished = set(made) - set(_local(folder))
    for name in (*made, *_kept(uri)):
        if used is None or step_of(name) > step_of(used) or name in unfinished:
            remove(name)


def restore(checkpoint: Path | None, out_dir: Path) -> None:
    """Brings what lies beside the checkpoints to where it was when this one was made; without one, to where a training begins.

    What a run that was killed wrote after it may be half, or of a step that this run comes to on another way.
    """
    for name in ("best", "last", "best.partial", "last.partial"):
        shutil.rmtree(out_dir / name, ignore_errors=True)
    if checkpoint is None:
        return
    if (checkpoint / "best").exists():
        shutil.copytree(checkpoint / "best", out_dir / "best")
    shutil.copy(checkpoint / "log.jsonl", out_dir / "log.jsonl")


def twin_of(student: Path, place: Path) -> None:
    """Puts a saved student at a second place, without a second copy where the file system has hard links."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(student, place, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # volumes over SMB, and buckets that are mounted, have none
        shutil.copy(source, target)


def complete_checkpoint(folder: Path, out_dir: Path, progress: Progress, uri: str | None) -> None:
    """Adds to a checkpoint what lies beside it, seals it, and keeps it at `uri` in place of older ones.

    A store that is out of reach for a while ends no training: the log says that this one is not kept there.
    """
    for second in folder.glob("pytorch_model_fsdp*"):  # accelerate's copy of the weights, which nothing reads
        remove(str(second))
    best, log = out_dir / "best", out_dir / "log.jsonl"
    if best.exists():  # with the checkpoint, in case the run goes on elsewhere
        twin_of(best, folder / "best")
    shutil.copy(log, folder / log.name)
    write_whole(folder / STATE_FILE, json.dumps(asdict(progress)))
    seal(folder)
    if uri is None:
        return
    try:
        publish(folder, f"{uri.rstrip('/')}/{folder.name}")
        for name in _kept(uri)[:-KEPT]:
            remove(name)
    except InputError as e:
        if not is_remote(uri):
            raise
        logger.warning("%s is not kept in the store (%s); the training goes on, and keeps the next one there", folder.name, e)
