"""Training on GPUs: killed and resumed, nothing left behind, teachers sharded over NCCL, several GPUs as one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model
from tests.unit.test_teachers import dense, micro_batches, own_logits, setup
from tests.unit.training_run import FIVE_STEPS, changed, losses, prepare
from xtoken_core.teachers.process import Shards
from xtoken_core.teachers.schedule import TeacherPool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def values(base):
    """Two teachers in bf16, weighted by their CE, one of them offloaded; W is trained."""
    spec = prepare(base, loss={"weight_metric": "ce"}, training=FIVE_STEPS | {"precision": "bf16"})
    spec["teachers"][0]["projection"] = {"learnable": True, "learning_rate": 0.05}
    spec["teachers"][1]["residency"] = "offload"
    return spec


def start(values, base, out, gpus="0"):
    """A run in a process of its own, on GPUs by number."""
    command = [sys.executable, "-m", "tests.unit.training_run", json.dumps(values), str(base), str(out)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus}, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def unbroken(base, values):
    finish(start(values, base, base / "unbroken"))
    return losses(base / "unbroken")


def shared_memory():
    return {name for name in os.listdir("/dev/shm") if name.startswith(("torch_", "cuda.shm"))}


def test_a_killed_run_leaves_nothing_and_goes_on_as_if_nothing_had_happened(base, values, unbroken):
    torch.zeros(1, device="cuda")
    out, before, (free, _) = base / "killed", shared_memory(), torch.cuda.mem_get_info()
    process, deadline = start(values, base, out), time.monotonic() + 200
    while not (out / "checkpoints" / "checkpoint-2" / "distillation.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 15
    while (shared_memory() - before or torch.cuda.mem_get_info()[0] < free - 2**26) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert shared_memory() <= before, f"student: {process.pid:x}"
    assert torch.cuda.mem_get_info()[0] >= free - 2**26
    finish(start(values, base, out))
    assert json.loads((out / "summary.json").read_text())["resumed_from"] in (2, 4)
    for ours, theirs in zip(losses(out), unbroken, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_teacher_sharded_over_the_gpus_hands_over_the_whole_models_logits(tmp_path):
    """One rank per GPU; on one GPU a group of one, over NCCL all the same."""
    folder, gpus = tiny_model(tmp_path / "teacher", 400), min(torch.cuda.device_count(), 2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    samples = [micro_batches((2, 9), (1, 5 + number), seed=number) for number in range(gpus)]

    def rank(number):
        one = setup(folder, f"rank {number}", shards=Shards(address, number, gpus), device=torch.device("cuda", number))
        with TeacherPool([one]) as pool:
            for _ in range(2):
                for found, batch in zip(pool.run([samples[number]])[0].logits, samples[number], strict=True):
                    torch.testing.assert_close(dense(found).cpu(), own_logits(folder, batch), rtol=1e-3, atol=1e-4)
        return True

    with ThreadPoolExecutor(gpus) as ranks:
        assert all(ranks.map(rank, range(gpus)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_gpus_train_as_one(base, values, sharding):
    exact = changed(values, training={"precision": "fp32", "micro_batch_size": 1, "sharding": sharding})
    for name, gpus in (("one", "0"), ("two", "0,1")):
        finish(start(exact, base, base / f"{sharding}-{name}", gpus))
    for ours, theirs in zip(losses(base / f"{sharding}-two"), losses(base / f"{sharding}-one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert json.loads((base / f"{sharding}-two" / "summary.json").read_text())["ranks"] == 2
