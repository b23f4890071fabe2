"""Work by several processes: results in order, items taken a few ahead, errors and deaths told. Real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from itertools import count, islice

import psutil
import pytest

from tests.support.processes import ended
from tests.support.tiny import tiny_run
from xtoken_core.data import parallel
from xtoken_core.data.parallel import mapped
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.errors import InputError, RunError
from xtoken_core.forking import start_process, start_server
from xtoken_core.spec import DistillationSpec

pytestmark = pytest.mark.slow


def times(factor):
    """The work: also tells which process did it."""

    def work(item):
        if item == 40 and factor == 0:
            raise InputError("item 40 is bad")
        if item == 40 and factor < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * factor, os.getpid()

    return work


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(parallel, "PATIENCE", 0.0)
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)


def test_results_are_in_order_and_come_from_several_processes():
    found = list(mapped(range(300), times(3), times, (3,)))
    assert [(item, value) for item, (value, _) in found] == [(n, 3 * n) for n in range(300)]
    processes = {process for _, (_, process) in found}
    assert len(processes) > 1 and os.getpid() in processes


def test_short_work_starts_no_process(monkeypatch):
    monkeypatch.setattr(parallel, "PATIENCE", 1e9)
    assert {process for _, (_, process) in mapped(range(300), times(3), times, (3,))} == {os.getpid()}


def test_an_endless_stream_may_be_left():
    taken = []
    items = (taken.append(n) or n for n in count())
    results = mapped(items, times(1), times, (1,))
    assert [item for item, _ in islice(results, 20)] == list(range(20))
    results.close()
    assert len(taken) <= 20 + 6


@pytest.mark.parametrize(("factor", "error"), [(0, InputError), (-1, RunError)])
def test_errors_and_deaths_end_the_work(factor, error):
    with pytest.raises(error, match="item 40 is bad" if error is InputError else "died"):
        list(mapped(range(300), times(factor), times, (factor,)))


def test_a_death_is_told_also_to_one_who_takes_his_time():
    """It is then found when the next item is given away, not when a result is waited for."""
    with pytest.raises(RunError, match="died"):
        for item, _ in mapped(range(300), times(-1), times, (-1,)):
            time.sleep(0.2 * (item > 34))


def endless(pipe):
    """Runs in a process of its own; tells which other one works for it, and takes no further result."""
    parallel.PATIENCE, parallel.usable_cores = 0.0, lambda: 2
    for _, (_, process) in mapped(count(), times(1), times, (1,)):
        if process != os.getpid():
            pipe.send(process)
            signal.pause()


def test_processes_end_with_the_one_that_they_work_for_when_that_is_killed():
    start_server(["xtoken_core.data.tokenizing"])
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    parent = context.Process(target=endless, args=(theirs,))
    start_process(parent)
    worker = psutil.Process(ours.recv())
    parent.kill()
    parent.join()
    assert ended([worker])


def test_rows_are_the_same_whoever_prepares_them(tmp_path, monkeypatch):
    """Texts and chats, in shards too."""
    values = tiny_run(tmp_path, teachers=1)
    texts = [{"text": f"Document {n}. " + "A quick brown fox. " * (n % 9)} for n in range(400)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    values["data"] = values["data"] | {"train": [str(tmp_path / "many.jsonl")], "shards": 2, "max_length": 32}
    spec = DistillationSpec.model_validate(values)
    for name, cores in (("one", 1), ("several", 2)):
        monkeypatch.setattr(parallel, "usable_cores", lambda cores=cores: cores)
        stats = prepare_rows(spec, tmp_path / name, "train", shard=1)
        assert stats.documents == 200
    for file in ("rows.arrow", "first_tokens.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "several" / file).read_bytes()


def test_a_containers_share_bounds_the_cores(monkeypatch):
    monkeypatch.undo()
    assert 1 <= parallel.usable_cores() <= os.cpu_count()
