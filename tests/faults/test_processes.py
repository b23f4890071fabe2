"""Processes that hang, die or lose whom they work for."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.tiny import tiny_model
from tests.teachers.test_teachers import micro_batches, setup
from xtoken_core.errors import InputError, NonFiniteError, RunError, errors_left_in, leave_error, left_error
from xtoken_core.teachers import handle
from xtoken_core.teachers.pool import TeacherPool
from xtoken_core.teachers.setup import TeacherError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("teacher"), 400)


class Clock:
    """The clock by which a student waits for its teachers."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(handle, "time", SimpleNamespace(monotonic=lambda: self.now))

    def skip(self, seconds: float) -> None:
        self.now += seconds


def test_a_teacher_that_hangs_is_told_and_then_ends_the_run(folder, monkeypatch, caplog, fault):
    """SIGSTOP: so looks a hung driver, a frozen container, a host that swaps."""
    teachers = [setup(folder, "teachers.0 (one)"), setup(folder, "teachers.1 (two)", timeout=100.0)]
    last_words = r"^teachers\.1 \(two\): no sign of life for 100 s while it had to run$"
    with pytest.raises(TeacherError, match=last_words) as told, TeacherPool(teachers) as pool:
        pool.run([micro_batches((1, 4))] * 2)
        caplog.clear()  # of one that loads slowly there may have been a word
        clock, hanging = Clock(monkeypatch), pool.teachers[1]
        os.kill(hanging._process.pid, signal.SIGSTOP)
        monkeypatch.setattr(handle, "wait", lambda ends, seconds: clock.skip(seconds) if hanging._pipe in ends else wait(ends))
        with caplog.at_level(logging.WARNING, "xtoken_core"):
            pool.run([micro_batches((1, 4))] * 2)
    line = "teachers.1 (two): no sign of life for {} s while it has to run; the run ends after 100 s"
    assert caplog.messages == [line.format(seconds) for seconds in (30, 60, 90)]
    assert pool.teachers[1]._process.exitcode == -signal.SIGKILL
    fault("a teacher is stopped", "a line every 30 s, the end after training.timeout, by name", told.value)


def test_a_teacher_that_works_long_gives_signs_of_life(folder, monkeypatch, caplog):
    """Each micro-batch takes it 20 s; it may be silent for 25."""
    with TeacherPool([setup(folder, timeout=25.0)]) as pool, caplog.at_level(logging.WARNING, "xtoken_core"):
        caplog.clear()
        clock = Clock(monkeypatch)
        monkeypatch.setattr(handle, "wait", lambda ends, _: clock.skip(20.0) or wait(ends))
        assert len(pool.run([micro_batches(*[(1, 4)] * 50)])[0].logits) == 50
    assert caplog.messages == [] and clock.now >= 50 * 20


CHILD = """
import os, sys, time
from xtoken_core.processes import end_with
end_with(int(sys.argv[1]))
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM], ids=lambda s: s.name)
def test_a_runner_that_is_killed_takes_its_steps_along(how, fault):
    runner = subprocess.Popen(
        ["sleep", "600"], preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    )  # nohup ignores it
    step = subprocess.Popen([sys.executable, "-c", CHILD, str(runner.pid)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert step.stdout.readline() == "ready\n"
    runner.send_signal(how)
    runner.wait()
    assert step.wait(300) == -signal.SIGTERM
    fault(f"{how.name} for the runner of a step", "the step ends", "ended by SIGTERM")


def test_a_step_that_outlived_its_runner_before_it_could_watch_ends_too():
    runner = subprocess.Popen(["true"])
    runner.wait()
    assert subprocess.run([sys.executable, "-c", CHILD, str(runner.pid)], cwd=ROOT, timeout=300).returncode == -signal.SIGTERM


def test_the_first_error_of_several_processes_is_the_one_that_is_left(tmp_path):
    with errors_left_in(tmp_path / "error"):
        assert left_error(tmp_path / "error") is None
        leave_error(RunError("step 3: the first"))
        leave_error(InputError("the second"))
    left = left_error(tmp_path / "error")
    assert isinstance(left, RunError) and str(left) == "step 3: the first"
    assert [path.name for path in tmp_path.iterdir()] == ["error"]


def test_numbers_that_are_not_finite_are_known_as_that_by_the_program_that_started_the_ranks(tmp_path):
    with errors_left_in(tmp_path / "error"):
        leave_error(NonFiniteError("step 3: student: its loss is not finite"))
    assert isinstance(left_error(tmp_path / "error"), NonFiniteError)


def test_a_teacher_that_dies_while_the_student_waits_ends_the_run_in_seconds(folder, fault):
    last_words = r"^teachers\.0 \(one\): its process died \(SIGKILL"
    with pytest.raises(TeacherError, match=last_words) as told, TeacherPool([setup(folder)]) as pool:
        os.kill(pool.teachers[0]._process.pid, signal.SIGSTOP)
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -KILL {pool.teachers[0]._process.pid}"])
        pool.run([micro_batches((1, 4))])
    killer.wait()
    fault("a teacher is killed while the student waits for it", "the end in seconds, by name", told.value)
