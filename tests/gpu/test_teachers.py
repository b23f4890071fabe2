"""Teacher processes on a GPU: CUDA IPC, residency, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.warm import IMPORTED
from tests.support.gpus import needs_gpus
from tests.support.processes import forked, forkservers, left_in_shared_memory
from tests.support.tiny import tiny_model
from tests.teachers.test_teachers import IDS, dense, micro_batches, own_logits, setup
from xtoken_core.teachers.pool import TeacherPool
from xtoken_core.teachers.setup import TeacherError

pytestmark = needs_gpus(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("teacher"), 400)


def test_every_transport_and_residency_hands_over_the_models_logits(folder):
    cuda = {"device": torch.device("cuda", 0)}
    setups = [
        setup(folder, "hidden", residency="offload", **cuda),
        setup(folder, "logits", transport="logits", residency="resident", **cuda),
        setup(folder, "topk", transport="topk", top_k=IDS, **cuda),
    ]
    torch.zeros(1, device="cuda")
    before = set(os.listdir("/dev/shm"))
    with TeacherPool(setups) as pool:
        for shapes in (((2, 9), (1, 14)), ((1, 5),), ((3, 40), (2, 9))):
            batches = micro_batches(*shapes)
            for run in pool.run([batches] * 3):
                for batch, logits in zip(batches, run.logits):
                    torch.testing.assert_close(dense(logits).cpu(), own_logits(folder, batch), rtol=1e-3, atol=1e-4)
        assert [t.resident for t in pool.teachers] == [False, True, True]  # auto: it fits
        del run, logits
    assert not left_in_shared_memory(before)


def test_nothing_is_left_of_a_killed_teacher(folder):
    torch.zeros(1, device="cuda")
    before = set(os.listdir("/dev/shm"))
    with (
        pytest.raises(TeacherError, match="its process died"),
        TeacherPool([setup(folder, device=torch.device("cuda", 0))]) as pool,
    ):
        pool.run([micro_batches((1, 4))])
        os.kill(pool.teachers[0]._process.pid, signal.SIGKILL)
        pool.run([micro_batches((1, 4))])
    assert not left_in_shared_memory(before)


def test_the_process_that_teachers_are_forked_from_never_opens_a_gpu(folder):
    """CUDA that was begun before a fork is of no use after it; a teacher itself has the GPU open."""

    def devices(process):
        opened = (os.path.realpath(path) for path in Path(f"/proc/{process.pid}/fd").iterdir())
        return {device for device in opened if device.startswith("/dev/nvidia")}

    with TeacherPool([setup(folder, device=torch.device("cuda", 0))]) as pool:
        pool.run([micro_batches((1, 4))])
        [forkserver], [teacher] = forkservers(os.getpid()), forked(os.getpid())
        assert devices(teacher) and not devices(forkserver)


OPENED = """
import contextlib, importlib, os, sys
for module in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(module)
print([module for module in sys.argv[1:] if module in sys.modules])
print([os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")])
"""


def test_what_steps_are_forked_from_never_opens_a_gpu():
    """Of what it imports, what is installed."""
    done = subprocess.run([sys.executable, "-c", OPENED, *IMPORTED], capture_output=True, text=True, check=True)
    imported, opened = done.stdout.splitlines()
    assert "xtoken_core.training.distill" in imported
    assert "/dev/nvidia" not in opened
