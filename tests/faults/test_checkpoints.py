"""Checkpoints that are damaged, of other settings, or in use: nothing is lost, and the line says what is gone on from."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.training_run import FIVE_STEPS, changed, losses, prepare, run
from xtoken_core.checksums import check_whole, damage
from xtoken_core.errors import InputError, RunError
from xtoken_core.identity import identity
from xtoken_core.spec import DistillationSpec
from xtoken_core.training.checkpoints import checkpoint_of_step, latest_checkpoint, owned, training_identity
from xtoken_core.training.inputs import TrainingInputs

FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "learnable.safetensors",
    "distillation.json",
    "log.jsonl",
    "config.json",
    "best/model.safetensors",
    "checksums.json",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def values(base):
    spec = prepare(base, teachers=1, training=FIVE_STEPS | {"eval_steps": 1})
    spec["teachers"][0]["projection"] = {"learnable": True}
    return spec


@pytest.fixture(scope="module")
def finished(base, values):
    """A run with the checkpoints of steps 4 and 5, kept at a second place."""
    run(values, base, base / "finished", checkpoint_uri=str(base / "kept"))
    return base / "finished"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {cut: "cut in half", flip: "a bit flipped", Path.unlink: "removed"}


@pytest.mark.parametrize("harm", HARM, ids=HARM.values())
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(finished, tmp_path, caplog, fault, name, harm):
    folder = shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    assert damage(folder / "checkpoint-5") is None
    harm(folder / "checkpoint-5" / name)
    with caplog.at_level(logging.INFO, "xtoken_core"):
        assert latest_checkpoint(folder, None) == folder / "checkpoint-4"
    *damaged, resumes = caplog.messages
    assert resumes == f"resumes at step 4, from {folder}/checkpoint-4"
    if name != "checksums.json":  # which tells of others; without it a checkpoint was never finished
        assert damaged == [f"{folder}/checkpoint-5 is damaged ({name} is not as it was written); the one before is used"]
    fault(f"{name} of the newest checkpoint: {HARM[harm]}", "said, the one before is used", resumes[:18])


def test_a_run_with_a_damaged_checkpoint_ends_as_an_unbroken_one(base, values, finished, fault):
    kept = base / "kept-damaged"
    shutil.copytree(base / "kept", kept)
    cut(kept / "checkpoint-5" / "optimizer.pt")
    summary = run(values, base, base / "again", checkpoint_uri=str(kept))
    assert summary.resumed_from == 4
    ours, theirs = (load_file(folder / "last" / "model.safetensors") for folder in (base / "again", finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert damage(kept / "checkpoint-5") is None  # written anew
    fault("kept optimizer.pt cut in half, run again", "weights of an unbroken run", "bitwise equal, resumed at step 4")


def test_all_checkpoints_damaged_begins_from_the_start(finished, tmp_path, caplog, fault):
    folder = shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    for number in (4, 5):
        cut(folder / f"checkpoint-{number}" / "optimizer.pt")
    with caplog.at_level(logging.INFO, "xtoken_core"):
        assert latest_checkpoint(folder, None) is None
    assert caplog.messages[-1] == f"no checkpoint found in {folder}"
    fault("every checkpoint damaged", "begins from the start and says so", caplog.messages[-1][:30])


def test_other_settings_are_another_identity_and_are_named(base, values, finished, tmp_path, caplog, fault):
    root = tmp_path / "checkpoints"
    shutil.copytree(base / "kept", root / "other")
    with caplog.at_level(logging.INFO, "xtoken_core"):
        assert latest_checkpoint(tmp_path / "none", str(root / "own")) is None
    assert caplog.messages[-1] == f"no checkpoint found in {root}/own; {root}/other holds some of other settings"
    with pytest.raises(InputError, match="holds checkpoints of another spec") as told:
        run(changed(values, training={"learning_rate": 0.5}), base, finished)
    fault("the spec was changed, its checkpoints are there", "not resumed, named, not removed", told.value)
    assert checkpoint_of_step(finished / "checkpoints", None, 5).exists()


def test_the_order_of_keys_and_what_changes_nothing_are_no_other_identity(values, fault):
    spec = DistillationSpec.model_validate(values)
    modes = {"other": "p_kl", "same": "same_vocabulary"}
    own = training_identity(spec, TrainingInputs((), modes), False)
    assert training_identity(spec, TrainingInputs((), dict(reversed(modes.items()))), False) == own
    told_less = DistillationSpec.model_validate(changed(values, training={"log_steps": 3, "skip_nonfinite": 2, "timeout": 5}))
    assert training_identity(told_less, TrainingInputs((), modes), False) == own
    assert training_identity(spec, TrainingInputs((), modes), True) != own
    with pytest.raises(ValueError):
        identity(float("nan"))
    fault("modes in another order of keys", "the same identity, hence resumed", own)


def test_two_runs_never_share_a_checkpoint_folder(base, values, tmp_path, fault):
    with owned(tmp_path), pytest.raises(InputError, match=f"^{tmp_path}: another run") as told:
        run(values, base, tmp_path / "out", checkpoint_uri=str(tmp_path))
    fault("a second run on one checkpoint folder", "refused in one line", told.value)
    with owned(tmp_path, None):  # given back when the first has ended
        pass


def test_resuming_a_finished_run_changes_nothing(base, values, finished):
    before = losses(finished)
    assert run(values, base, finished).resumed_from == 5
    assert losses(finished) == before


def test_a_trained_student_that_was_damaged_later_is_found_and_made_again(base, values, tmp_path, fault):
    """As `finish` does before it publishes, and a local run before it looks into its cache."""
    out = tmp_path / "run"
    run(changed(values, training={"max_steps": 1, "eval_steps": None}), base, out, baseline=True)
    check_whole(out)
    cut(out / "best" / "model.safetensors")
    with pytest.raises(RunError, match=f"^{out}: best/model.safetensors is not as it was written") as told:
        check_whole(out)
    assert not out.exists()  # the cache then has it no more
    fault("a cached student is cut in half", "found before it is published, made again", told.value)
