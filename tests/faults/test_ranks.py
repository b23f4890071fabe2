"""Ranks of one host that hang or die, and who can reach them from outside."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

from pipelines.warm import fork
from tests.support.processes import stopped
from tests.support.training_run import FIVE_STEPS, changed, losses, prepare, run
from xtoken_core.errors import RunError
from xtoken_core.training.launch import on_every_gpu
from xtoken_core.training.trainer import DistillationTrainer

pytestmark = pytest.mark.slow

TIMEOUT = 8.0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def values(base):
    return prepare(base, teachers=1, training=FIVE_STEPS | {"micro_batch_size": 1, "timeout": TIMEOUT, "max_steps": 10_000})


def signalled(values, base, out, who, number):
    """A rank's training, in which one sends itself a signal after the first step."""

    def strike():
        while not (out / "log.jsonl").exists() or not losses(out):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    if os.environ["RANK"] == who:
        threading.Thread(target=strike, daemon=True).start()
    run(values, base, out)


def stuck(values, base, out):
    """A rank's training, in which the main thread of rank 1 hangs while its other threads go on."""
    forward = DistillationTrainer.compute_loss

    def hang(trainer, *arguments, **options):
        if trainer.state.global_step == 1 and os.environ["RANK"] == "1":
            time.sleep(600)
        return forward(trainer, *arguments, **options)

    with mock.patch.object(DistillationTrainer, "compute_loss", hang):
        run(values, base, out)


def last_words(body, *arguments):
    """Prints the line with which a run of two ranks ends."""
    with pytest.raises(RunError) as told:
        on_every_gpu(2, body, arguments)
    print(f"\n{told.value}")


@pytest.fixture(scope="module")
def ends(base, values):
    """The lines with which runs end in which a rank does not answer. They wait for it at the same time, each in a process of its own."""
    runs = {f"rank {who} is stopped": (signalled, values, base, base / who, who, signal.SIGSTOP) for who in "01"}
    runs["the main thread of rank 1 hangs"] = (stuck, values, base, base / "stuck")
    started = {what: fork(last_words, *run) for what, run in runs.items()}
    told = {what: output.read().rstrip("\n").rpartition("\n")[2] for what, (_, output) in started.items()}
    for process, _ in started.values():
        process.join()
    return told


@pytest.mark.parametrize("who", ["0", "1"])
def test_a_rank_that_is_stopped_ends_the_run_by_name(ends, fault, who):
    told = ends[f"rank {who} is stopped"]
    assert re.search(rf"^rank {who} \(.*process \d+\): no sign of life for 8 s; the last came from \w+", told), told
    assert not stopped(os.getpid())
    fault(f"rank {who} is stopped", "the end after training.timeout, by name", told)


def test_a_rank_that_is_killed_ends_the_run_by_name(base, values, tmp_path, fault):
    patient = changed(values, training={"timeout": 120})  # a death is seen at once, whatever the signs of life do
    with pytest.raises(RunError, match=r"^rank 1: its process died \(SIGKILL, perhaps out of memory\)$") as told:
        on_every_gpu(2, signalled, (patient, base, tmp_path, "1", signal.SIGKILL))
    fault("rank 1 is killed", "the end in seconds, by name", told.value)


def test_a_rank_whose_main_thread_hangs_is_told_by_where_it_is(ends, fault):
    told = ends["the main thread of rank 1 hangs"]
    where = r"does not come out of step 2, the teachers; the others have waited for it for 10 s"
    assert re.search(rf"^rank 1 \(.*process \d+\): {where}$", told), told
    fault("the main thread of rank 1 hangs", "the end, by name and place", told)


def listeners(values: dict, base: Path, out: Path) -> tuple[set[str], int]:
    """A rank's training; the addresses that this rank, its teachers and servers listened on meanwhile, and how often it was looked."""
    found: set[str] = set()
    looks, over = 0, threading.Event()

    def look():
        nonlocal looks
        while not over.is_set():
            for process in (psutil.Process(), *psutil.Process(os.getppid()).children(recursive=True)):
                try:
                    connections = process.net_connections("inet")
                except psutil.Error:
                    continue
                found.update(c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN)
            looks += 1
            over.wait(0.05)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        run(values, base, out)
    finally:
        over.set()
        thread.join()
    return found, looks


def test_nothing_of_a_run_listens_on_other_interfaces(base, values, tmp_path, fault):
    few = changed(values, training={"max_steps": 3, "timeout": 600.0})
    found, looks = on_every_gpu(2, listeners, (few, base, tmp_path))
    assert looks > 5
    assert found <= {"127.0.0.1", "::1"}, found
    assert found  # gloo's: the look sees what is there
    fault("sockets of a run of two ranks with teachers", "none on other interfaces", f"listening on {', '.join(found)} only")
