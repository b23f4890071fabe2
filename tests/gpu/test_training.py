"""Training on GPUs: killed and resumed, nothing left behind, teachers sharded over NCCL, several GPUs as one."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

from tests.distributed.test_sharded_teacher import hands_over_the_whole_models_logits
from tests.support.processes import left_in_shared_memory
from tests.support.tiny import tiny_model
from tests.support.training_run import FIVE_STEPS, changed, losses, prepare, start, start_and_kill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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


@pytest.fixture(scope="module")
def unbroken(base, values):
    start(values, base, base / "unbroken", CUDA_VISIBLE_DEVICES="0").finish()
    return losses(base / "unbroken")


def test_a_killed_run_leaves_nothing_and_goes_on_as_if_nothing_had_happened(base, values, unbroken):
    torch.zeros(1, device="cuda")
    out, before, (free, _) = base / "killed", set(os.listdir("/dev/shm")), torch.cuda.mem_get_info()
    start_and_kill(values, base, out, CUDA_VISIBLE_DEVICES="0")
    deadline = time.monotonic() + 60
    while torch.cuda.mem_get_info()[0] < free - 2**26 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left_in_shared_memory(before)
    assert torch.cuda.mem_get_info()[0] >= free - 2**26
    start(values, base, out, CUDA_VISIBLE_DEVICES="0").finish()
    assert json.loads((out / "summary.json").read_text())["resumed_from"] == 2
    for ours, theirs in zip(losses(out), unbroken, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_a_teacher_sharded_over_the_gpus_hands_over_the_whole_models_logits(tmp_path, gpus):
    """One rank per GPU; on one GPU a group of one, over NCCL all the same."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    folder = tiny_model(tmp_path / "teacher", 400)
    devices = [f"cuda:{number}" for number in range(gpus)]
    assert hands_over_the_whole_models_logits(folder, devices, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_gpus_train_as_one(base, values, sharding):
    exact = changed(values, training={"precision": "fp32", "micro_batch_size": 1, "sharding": sharding})
    for name, gpus in (("one", "0"), ("two", "0,1")):
        start(exact, base, base / f"{sharding}-{name}", CUDA_VISIBLE_DEVICES=gpus).finish()
    for ours, theirs in zip(losses(base / f"{sharding}-two"), losses(base / f"{sharding}-one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert json.loads((base / f"{sharding}-two" / "summary.json").read_text())["ranks"] == 2
