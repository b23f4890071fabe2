"""The same global batch over 1, 2 and 4 gloo processes: one loss, one gradient, and no rank waits for another in vain."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipelines.warm import fork
from tests.support.losses_split import SAMPLES, SPECS, step

pytestmark = pytest.mark.slow

TIMEOUT = 180
"""Seconds a collective may wait for the slowest rank: far more than a step takes, far less than the test's own limit."""


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    results = {}
    for size in (1, 2, 4):
        group = dist.new_group(range(size))
        if rank < size:
            share = SAMPLES // size
            mine = range(rank * share, (rank + 1) * share)
            results[size] = [step(spec, [[i] for i in mine], group=group) for spec in SPECS]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.timeout(500)
def test_processes(tmp_path: Path) -> None:
    """With 4 processes the last has no valid chunk and no counted token, and another one a sample that is masked out."""
    ranks = [fork(worker, rank, 4, str(tmp_path)) for rank in range(4)]
    for process, output in ranks:
        printed = output.read()
        process.join()
        assert process.exitcode == 0, printed  # after TIMEOUT, where a rank waits for a collective that another has skipped

    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    for i, spec in enumerate(SPECS):
        whole, whole_metrics, whole_scale = step(spec, [range(SAMPLES)])
        for rank, sizes in enumerate(results):
            for size, steps in sizes.items():
                parts, metrics, scale = steps[i]
                for part, expected in zip(parts, whole, strict=True):
                    torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-12, msg=f"{spec}, rank {rank} of {size}")
                assert metrics == pytest.approx(whole_metrics, rel=1e-9)
                assert scale == pytest.approx(whole_scale, rel=1e-9)
