"""The wall clock is set forwards and backwards while things run: what lives stays alive, and no duration is wrong."""

from __future__ import annotations

import ast
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipelines import status
from pipelines.status import Status, statuses
from tests.support.tiny import tiny_model
from tests.teachers.test_teachers import micro_batches, setup
from xtoken_core import storage
from xtoken_core.errors import InputError
from xtoken_core.storage import claims
from xtoken_core.teachers.pool import TeacherPool
from xtoken_core.training.ranks import Heard, Sign, Watch
from xtoken_core.workflow.step import step

ROOT = Path(__file__).parents[2]
DAY = 86_400.0

STAMPS = {
    "xtoken_core/workflow/step.py",
    "xtoken_core/data/prepare.py",
    "pipelines/status.py",
    "pipelines/local.py",
    "pipelines/submit.py",
    "xtoken_core/report/run.py",
}
"""Files that ask for the time of day, to say when something was."""


@pytest.fixture
def jump(monkeypatch):
    """Sets the clock of this process by so many seconds: Python's, and the boot time that the system reckons from it."""
    now, boot, create = time.time, psutil.boot_time, psutil.Process.create_time

    def by(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now() + seconds)
        monkeypatch.setattr(psutil, "boot_time", lambda: boot() + seconds)
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: create(self) + seconds)

    return by


JUMPS = pytest.mark.parametrize("seconds", [DAY, -DAY], ids=["forwards", "backwards"])


def name(seconds: float) -> str:
    return f"the clock is set a day {'forwards' if seconds > 0 else 'backwards'}"


@JUMPS
@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_claim_is_held_over_a_jump(where, seconds, jump, request, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(claims, "REFRESH", 0.2)
    place = str(tmp_path / "place")
    if where == "s3":
        request.getfixturevalue("weed").enter(monkeypatch, "clock")
        place = f"s3://clock/{tmp_path.name}"
    with storage.claimed(place, "works") as check:
        jump(seconds)
        with pytest.raises(InputError, match="another run works there just now") as told, storage.claimed(place, "works"):
            pass
        check()
    fault(f"{name(seconds)} while a place is claimed ({where})", "the holder keeps it", told.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("teacher"), 400)


@JUMPS
def test_a_teacher_is_not_taken_for_dead(folder, seconds, jump, caplog, fault):
    with TeacherPool([setup(folder, timeout=30.0)]) as pool:
        pool.run([micro_batches((1, 4))])
        caplog.clear()  # of one that loads slowly there may have been a word
        jump(seconds)
        assert len(pool.run([micro_batches((1, 4))])[0].logits) == 1
    assert caplog.messages == []
    fault(f"{name(seconds)} while a teacher works", "no word of it", "it has worked on")


@JUMPS
def test_a_rank_is_not_taken_for_dead(seconds, jump, fault):
    watch = Watch(0, 2, limit=30.0)
    watch.at("step 1")
    heard = {rank: Heard(Sign(1, 1, "step 1", f"host {rank}"), time.monotonic()) for rank in range(2)}
    jump(seconds)
    assert watch._fault(heard) is None
    heard[1].alive -= 31
    assert "rank 1 (host 1): no sign of life for 30 s" in (said := watch._fault(heard))
    fault(f"{name(seconds)} while two ranks train", "only real silence counts", said)


@JUMPS
def test_a_run_that_lives_is_not_interrupted(seconds, jump, tmp_path, fault):
    (tmp_path / "run").mkdir()
    Status.of_this_process("run", tmp_path / "run" / "log", 3).tell(tmp_path / "run")
    jump(seconds)
    (told,) = statuses(tmp_path)
    assert told.state == "running"
    assert "-" not in status.told(told).splitlines()[0]
    fault(f"{name(seconds)} while a run is looked at", "it runs", status.told(told))


@JUMPS
def test_durations_are_right(seconds, jump, capsys, monkeypatch, fault):
    monkeypatch.setattr("xtoken_core.workflow.step.show_log", lambda: None)  # its handler would outlive this test
    made = SimpleNamespace(metadata={})
    with step("prepare", made):
        jump(seconds)
    assert 0 <= made.metadata["seconds"] < 60 and "-" not in capsys.readouterr().out
    fault(f"{name(seconds)} during a step", "its seconds are those that it took", f"{made.metadata['seconds']} s")


def test_the_time_of_day_is_asked_only_to_say_when_something_was():
    asking = set()
    for path in (p for part in ("xtoken_core", "pipelines", "components") for p in (ROOT / part).rglob("*.py")):
        called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        if called & {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "time.localtime"}:
            asking.add(str(path.relative_to(ROOT)))
    assert asking == STAMPS
