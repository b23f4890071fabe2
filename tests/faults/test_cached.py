"""What a step of an earlier local run has written is taken from the cache only as it was written: else every rerun fails the same way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from kfp import dsl

from pipelines.local import _forget_damaged
from xtoken_core.checksums import FILE, seal
from xtoken_core.workflow import step as steps
from xtoken_core.workflow.step import RUNNER, step

RUNS = ("tiny-2026-11-27-19-34-07-008998", "tiny-2026-11-27-19-36-00-000000")
"""As KFP names them."""


def artifact(path: Path) -> dsl.Artifact:
    made = dsl.Artifact(name=path.name, uri=str(path))
    made.custom_path = str(path)
    return made


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.setenv(RUNNER, str(os.getpid()))
    monkeypatch.setattr(steps, "end_with", lambda _: None)


@pytest.fixture
def run(tmp_path, runner):
    """Two runs of three steps, which write a folder, a file, and a folder that is sealed already."""
    for name in RUNS:
        folder = tmp_path / name
        with step("prepare", artifact(folder / "prepare" / "rows")):
            (folder / "prepare" / "rows" / "train").mkdir(parents=True)
            (folder / "prepare" / "rows" / "train" / "rows.arrow").write_bytes(b"rows" * 100)
        with step("overlap", artifact(folder / "overlap" / "report")):
            (folder / "overlap").mkdir()
            (folder / "overlap" / "report").write_text('{"a": 1}')
        with step("distill", artifact(folder / "distill" / "run")):
            (folder / "distill" / "run").mkdir(parents=True)
            (folder / "distill" / "run" / "last").write_bytes(b"weights")
            seal(folder / "distill" / "run")
    return tmp_path


def left(root: Path) -> set[str]:
    return {path.parent.name + "/" + path.name for path in root.glob("*/*/*") if path.name != FILE}


@pytest.mark.parametrize("name", ["prepare/rows/train/rows.arrow", "overlap/report", "distill/run/last"])
@pytest.mark.parametrize("harm", ["cut in half", "a bit flipped", "removed"])
def test_what_is_damaged_is_made_again_and_nothing_else(run, fault, capsys, name, harm):
    _forget_damaged(run)
    everything = left(run)
    path = run / RUNS[0] / name
    content = path.read_bytes()
    path.unlink()
    if harm != "removed":
        path.write_bytes(content[: len(content) // 2] if harm == "cut in half" else bytes([content[0] ^ 1]) + content[1:])
    (run / RUNS[1] / "prepare" / "executor_output.json").touch()  # KFP's own
    _forget_damaged(run)
    artifact = run / RUNS[0] / Path(*Path(name).parts[:2])
    assert not artifact.exists() and left(run) >= everything and (run / RUNS[1] / artifact.relative_to(run / RUNS[0])).exists()
    told = capsys.readouterr().err
    assert f"{Path(name).name} is not as it was written" in told
    fault(f"{name} of an earlier run is {harm}", "found before it is used, made again", told)


def test_a_copy_that_a_user_keeps_and_changes_there_stays(run):
    kept = shutil.copytree(run / RUNS[0] / "distill", run / "mine" / "distill")
    (kept / "run" / "last").write_bytes(b"mine")
    _forget_damaged(run)
    assert (kept / "run" / "last").read_bytes() == b"mine"


def test_elsewhere_nothing_is_written_beside_an_artifact(tmp_path):
    with step("overlap", artifact(tmp_path / "report")):
        (tmp_path / "report").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
