"""Training on GPUs: killed and resumed, nothing left behind, teachers sharded over NCCL, several GPUs as one."""

from __future__ import annotations

import json
import os

import pytest

from tests.distributed.test_sharded_teacher import hands_over_the_whole_models_logits
from tests.support.gpus import first_gpus, needs_gpus
from tests.support.processes import ended, forked, left_in_shared_memory
from tests.support.tiny import tiny_model
from tests.support.training_run import FIVE_STEPS, changed, losses, prepare, start, start_and_kill

pytestmark = needs_gpus(1)


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
    start(values, base, base / "unbroken", CUDA_VISIBLE_DEVICES=first_gpus(1)).finish()
    return losses(base / "unbroken")


def test_a_killed_run_leaves_nothing_and_goes_on_as_if_nothing_had_happened(base, values, unbroken):
    """No process of it stays, and so none of the GPU's memory."""
    out, before, others = base / "killed", set(os.listdir("/dev/shm")), set(forked(os.getpid()))
    start_and_kill(values, base, out, CUDA_VISIBLE_DEVICES=first_gpus(1))
    assert ended(set(forked(os.getpid())) - others)
    assert not left_in_shared_memory(before)
    start(values, base, out, CUDA_VISIBLE_DEVICES=first_gpus(1)).finish()
    assert json.loads((out / "summary.json").read_text())["resumed_from"] == 2
    for ours, theirs in zip(losses(out), unbroken, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("gpus", [1, *(pytest.param(count, marks=needs_gpus(count)) for count in (2, 4))])
def test_a_teacher_sharded_over_the_gpus_hands_over_the_whole_models_logits(tmp_path, gpus):
    """One rank per GPU; on one GPU a group of one, over NCCL all the same."""
    folder = tiny_model(tmp_path / "teacher", 400)
    devices = [f"cuda:{number}" for number in range(gpus)]
    assert hands_over_the_whole_models_logits(folder, devices, rtol=1e-3, atol=1e-4)


@needs_gpus(2)
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_gpus_train_as_one(base, values, sharding):
    exact = changed(values, training={"precision": "fp32", "micro_batch_size": 1, "sharding": sharding})
    runs = {
        name: start(exact, base, base / f"{sharding}-{name}", CUDA_VISIBLE_DEVICES=first_gpus(n))
        for n, name in ((1, "one"), (2, "two"))
    }
    for started in runs.values():
        started.finish()
    for ours, theirs in zip(losses(base / f"{sharding}-two"), losses(base / f"{sharding}-one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert json.loads((base / f"{sharding}-two" / "summary.json").read_text())["ranks"] == 2


def test_a_compiled_training_is_the_same_within_rounding(base, values):
    """Teachers and student compile side by side before the first step, which changes nothing but the speed."""
    whole = changed(values, training={"precision": "fp32", "max_steps": 2, "save_steps": None, "eval_steps": None})
    for name, compiled in (("eager", False), ("compiled", True)):
        start(changed(whole, training={"compile": compiled}), base, base / name, CUDA_VISIBLE_DEVICES=first_gpus(1)).finish()
    for ours, theirs in zip(losses(base / "compiled"), losses(base / "eager"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
