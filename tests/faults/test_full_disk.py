"""Places that are full, read-only or run in a circle."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pipelines.local import run_locally
from tests.support.tiny import tiny_run
from tests.support.training_run import FIVE_STEPS, prepare, run
from xtoken_core import storage
from xtoken_core.data.documents import read_documents
from xtoken_core.errors import InputError, errors_left_in, full_disk
from xtoken_core.spec import DataSpec, DistillationSpec
from xtoken_core.storage import check_place
from xtoken_core.training.checkpoints import latest_checkpoint
from xtoken_core.workflow.step import step


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for a checkpoint, not for three."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_is_full_while_a_checkpoint_is_written(small_disk, tmp_path, capfd, caplog, fault):
    values = prepare(tmp_path, teachers=1, training=FIVE_STEPS | {"save_steps": 1})
    with pytest.raises(SystemExit) as ended, step("distill"):
        run(values, tmp_path, small_disk / "out")
    line = capfd.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and line.endswith(": No space left on device")
    kept = latest_checkpoint(small_disk / "out" / "checkpoints", None)
    assert kept is not None and f"resumes at step {kept.name[-1]}, from {kept}" in caplog.text + capfd.readouterr().err
    fault("the disk is full while a checkpoint is written", "one line; the one before is whole", f"{line}; then {kept.name}")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x"),
        OSError(errno.EFBIG, "x"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 196736 vs 196624"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_every_librarys_way_to_say_so_is_known(error):
    assert str(full_disk(error)) == "a working file: No space left on device"
    assert full_disk(RuntimeError("another")) is None and full_disk(OSError(errno.EIO, "x")) is None


def test_a_circle_of_links_is_no_place_and_no_input(tmp_path, fault):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    with pytest.raises(InputError) as told:
        check_place(str(tmp_path / "a"), "run")
    with pytest.raises(InputError):
        storage.expand([str(tmp_path / "a")])
    with pytest.raises(InputError):
        list(read_documents((str(tmp_path / "in"),), DataSpec(train="x")))
    fault("output.uri is a circle of links", "one line in resolve", told.value)


def test_odd_places_are_refused_or_taken_and_nothing_is_deleted(tmp_path, monkeypatch, fault):
    """The file system's root, the home folder, the folder the user stands in, and what has a file for a parent."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("mine")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    odd = ["/", ".", "~", "~/", "..", str(home), f"{home}/thesis.tex", f"{home}/thesis.tex/run", "file://", f"file://{home}"]
    for uri in [*odd, "s3://", "s3://bucket", "s3:/bucket/run", "file:/run"]:
        with pytest.raises(InputError) as told:
            check_place(uri, "run")
        assert "\n" not in str(told.value)
        fault(f"output.uri: {uri.replace(str(home), 'HOME')}", "one line, nothing is deleted", told.value)
    assert os.listdir(home) == ["thesis.tex"] and (home / "thesis.tex").read_text() == "mine"


def test_a_read_only_place_is_said_before_training(fault):
    place = Path("/proc/xtoken-run")
    with pytest.raises(InputError) as told:
        check_place(str(place), "run")
    fault("output.uri on a read-only file system", "one line in resolve", told.value)


def test_a_run_on_this_machine_whose_folder_is_full(small_disk, tmp_path, fault):
    """Wherever its log, its status or a step's result has no room: as in a step itself, a line."""
    spec = DistillationSpec.model_validate(tiny_run(tmp_path))
    filled = small_disk / "filled"
    with filled.open("wb") as file, contextlib.suppress(OSError):
        file.write(bytes(2**22))
    for free in (0, 12_000):
        filled.write_bytes(filled.read_bytes()[: filled.stat().st_size - free])
        with pytest.raises(InputError, match=": No space left on device$") as told:
            run_locally(spec, small_disk / "runs")
    assert not (tmp_path / "out").exists()
    fault("the folder of a local run is full", "one line", told.value)


def test_a_line_that_cannot_be_left_is_not_replaced_by_another(tmp_path, capfd):
    with errors_left_in(tmp_path / "absent" / "error"), pytest.raises(SystemExit) as ended, step("overlap"):
        raise InputError("teachers.0: the cause")
    assert ended.value.code == 2 and capfd.readouterr().err == "teachers.0: the cause\n"
