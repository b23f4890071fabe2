"""Work by several processes: results in order, items taken a few ahead, errors and deaths told. Real processes."""

from __future__ import annotations

import os
import signal
from itertools import count, islice

import pytest

from xtoken_core.data import parallel
from xtoken_core.data.parallel import mapped
from xtoken_core.errors import InputError, RunError


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
    found = list(mapped(range(300), times, (3,)))
    assert [(item, value) for item, (value, _) in found] == [(n, 3 * n) for n in range(300)]
    processes = {process for _, (_, process) in found}
    assert len(processes) > 1 and os.getpid() in processes


def test_short_work_starts_no_process(monkeypatch):
    monkeypatch.setattr(parallel, "PATIENCE", 1e9)
    assert {process for _, (_, process) in mapped(range(300), times, (3,))} == {os.getpid()}


def test_an_endless_stream_may_be_left():
    taken = []
    items = (taken.append(n) or n for n in count())
    results = mapped(items, times, (1,))
    assert [item for item, _ in islice(results, 20)] == list(range(20))
    results.close()
    assert len(taken) <= 20 + 6


@pytest.mark.parametrize(("factor", "error"), [(0, InputError), (-1, RunError)])
def test_errors_and_deaths_end_the_work(factor, error):
    with pytest.raises(error, match="item 40 is bad" if error is InputError else "died"):
        list(mapped(range(300), times, (factor,)))


def test_a_containers_share_bounds_the_cores(monkeypatch):
    monkeypatch.undo()
    assert 1 <= parallel.usable_cores() <= os.cpu_count()
