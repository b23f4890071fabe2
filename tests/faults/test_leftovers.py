"""What a training or a publication that was killed leaves half does not stay, and is not taken up."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import fsspec
import pytest

from tests.support.training_run import FIVE_STEPS, changed, losses, prepare, run
from xtoken_core import storage
from xtoken_core.checksums import damage
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec
from xtoken_core.training.checkpoints import check_inputs, clean_up, latest_checkpoint, restore


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("leftovers")


@pytest.fixture(scope="module")
def values(base):
    return prepare(base, teachers=1, training=FIVE_STEPS)


@pytest.fixture(scope="module")
def finished(base, values):
    """A run with the checkpoints of steps 4 and 5, kept at a second place."""
    run(values, base, base / "finished", baseline=True, checkpoint_uri=str(base / "kept"))
    return base / "finished"


@pytest.fixture
def kept(base, finished, tmp_path):
    return shutil.copytree(base / "kept", tmp_path / "kept")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_checkpoints_that_are_all_damaged_do_not_stay_in_place_of_new_ones(base, values, kept, tmp_path, fault):
    """By their numbers they would be the newest for ever, and each new one would go as soon as it is made."""
    for path in kept.glob("checkpoint-*"):
        path.rename(path.with_name(f"checkpoint-{path.name[-1]}00"))
        cut(kept / f"checkpoint-{path.name[-1]}00" / "optimizer.pt")
    run(changed(values, training={"max_steps": 3}), base, tmp_path / "out", baseline=True, checkpoint_uri=str(kept))
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    fault("every kept checkpoint is damaged", "the ones of the new training are kept", "checkpoint-2, checkpoint-3")


def test_half_copies_of_checkpoints_go_when_the_training_goes_on(kept, tmp_path, fault):
    shutil.copytree(kept / "checkpoint-5", kept / ".checkpoint-6.partial")
    shutil.copytree(kept / "checkpoint-5", tmp_path / "local" / "checkpoint-6")
    (tmp_path / "local" / "checkpoint-6" / "checksums.json").unlink()
    clean_up(tmp_path / "local", str(kept), kept / "checkpoint-5")
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoint-4", "checkpoint-5"]
    assert list((tmp_path / "local").iterdir()) == []
    fault("killed while a checkpoint was copied to its second place", "the half copy goes", "removed at the next start")


def test_in_an_object_store_too(tmp_path):
    uri, fs = f"memory://{tmp_path.name}/kept", fsspec.filesystem("memory")
    for name in ("checkpoint-1/a", ".checkpoint-2.partial/a", "checkpoint-3/a", "checkpoint-3/_INCOMPLETE"):
        fs.pipe(f"/{tmp_path.name}/kept/{name}", b"")
    storage.clear_leftovers(uri)
    assert fs.find(f"/{tmp_path.name}") == [f"/{tmp_path.name}/kept/checkpoint-1/a"]
    storage.clear_leftovers(f"memory://{tmp_path.name}/absent")


def test_what_lies_beside_is_that_of_the_checkpoint(finished, tmp_path, fault):
    """Whatever a training that was killed has made of it, and however often it is killed while it is brought back."""
    checkpoint, out = finished / "checkpoints" / "checkpoint-4", tmp_path / "out"
    shutil.copytree(finished / "best", out / "best")
    (out / "best" / "model.safetensors").unlink()
    shutil.copytree(finished / "last", out / "last.partial")
    shutil.copy(finished / "log.jsonl", out / "log.jsonl")
    cut(out / "log.jsonl")
    restore(checkpoint, out)
    assert sorted(path.name for path in out.iterdir()) == ["best", "log.jsonl"]
    assert contents(out / "best") == contents(checkpoint / "best")
    assert (out / "log.jsonl").read_bytes() == (checkpoint / "log.jsonl").read_bytes()
    fault("killed while best is replaced, or brought back", "best and log are those of the checkpoint", "equal")


def test_a_copy_of_a_checkpoint_by_its_side_is_left_alone(finished, tmp_path):
    folder = shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-4.mine")
    used = latest_checkpoint(folder, None)
    assert used == folder / "checkpoint-5"
    clean_up(folder, None, used)
    assert (folder / "checkpoint-4.mine").exists()


def test_a_note_of_the_identity_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """Half of one would be that of another spec, and every checkpoint refused."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "checksums.json").touch()
    check_inputs(tmp_path, "own")
    with pytest.MonkeyPatch.context() as killed:
        killed.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            check_inputs(tmp_path, "own")
    assert (tmp_path / "identity").read_text() == "own"


def test_a_file_system_without_hard_links(base, values, tmp_path, monkeypatch, fault):
    def link(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", link)
    out = tmp_path / "out"
    run(values, base, out, baseline=True)
    assert (
        len(losses(out)) == 5 and damage(out) is None and (out / "checkpoints" / "checkpoint-4" / "best" / "config.json").exists()
    )
    fault("the volume has no hard links", "trains", "copied")


def test_checkpoints_of_other_rows_are_not_gone_on_from(base, values, finished, tmp_path, fault):
    """The same spec and the same folders, in which another corpus was prepared meanwhile: one of as many documents and bytes."""
    there = shutil.copytree(base / "train", tmp_path / "there")
    spec = changed(values, data={"train": [str(there)]})
    rows, out = tmp_path / "rows", tmp_path / "out"

    def trained() -> int | None:
        for split in ("train", "validation"):
            prepare_rows(DistillationSpec.model_validate(spec), rows / split, split)
        return run(spec, tmp_path, out, baseline=True).resumed_from

    assert (trained(), trained()) == (None, 5)
    text = there / "0.txt"
    text.write_text(text.read_text().swapcase())
    with pytest.raises(InputError, match=f"^{out}/checkpoints: holds checkpoints of another spec or of other rows") as told:
        trained()
    fault("the rows were prepared from another text, its checkpoints are there", "not resumed, named, not removed", told.value)


@pytest.mark.parametrize("name", ["best", "last", "checkpoints/checkpoint-500"])
def test_what_no_training_of_this_project_left_is_not_replaced(base, values, tmp_path, fault, name):
    theirs = tmp_path / name / "model.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    with pytest.raises(
        InputError, match=f"^{tmp_path}/{name}: is there already, and no training of this project has made it"
    ) as told:
        run(values, base, tmp_path, baseline=True)
    assert theirs.read_bytes() == b"theirs"
    fault(f"--run names a folder with somebody's {name}", "refused before anything is deleted", told.value)
