"""Two processes over gloo train as one does: DDP and FSDP, each rank with teachers of its own. Torchrun starts the last ones."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

from tests.support.training_run import changed, losses, prepare, run, start_ranks
from xtoken_core.errors import InputError
from xtoken_core.models import load_model
from xtoken_core.projection import Projection
from xtoken_core.training.sharding import check_optimizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def values(base):
    settings = {
        "max_steps": 3,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "scheduler": "constant",
        "eval_steps": 2,
        "save_steps": 2,
    }
    spec = prepare(base, loss={"weight_metric": "ce", "dynamic_scaling": True}, training=settings)
    spec["teachers"][0]["projection"] = {"learnable": True}
    return spec


@pytest.fixture(scope="module")
def alone(base, values):
    return base / "alone", run(values, base, base / "alone")


def on_two_ranks(values, base, out):
    for rank in start_ranks(values, base, out):
        rank.finish()


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def spread(request, base, values):
    """How a run on two ranks is spread, and what it has left."""
    out = base / request.param
    on_two_ranks(changed(values, training={"sharding": request.param}), base, out)
    return request.param, out


def test_two_ranks_train_as_one(spread, alone):
    (_, out), (reference, summary) = spread, alone
    for ours, theirs in zip(losses(out), losses(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    two = json.loads((out / "summary.json").read_text())
    assert two["ranks"] == 2
    assert two["tokens"] == summary.tokens
    assert two["best_validation_bits_per_byte"] == pytest.approx(summary.best_validation_bits_per_byte, rel=1e-4)
    for name in ("last", "best"):
        load_model(str(out / name))
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (out, reference))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=2e-4) for key in theirs)
    learned = [Projection.load(folder / "last" / "projection-other.safetensors").weights for folder in (out, reference)]
    assert torch.allclose(*learned, atol=1e-3)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_teachers_that_are_not_heard_are_the_same_to_all_ranks(base, values, tmp_path, sharding):
    """One is never far enough ahead, the other always: what one rank decides all do, and a trained W without gradients ends no step."""
    unheard, heard = values["teachers"]
    given = changed(values, training={"max_steps": 2, "sharding": sharding}, loss={"weight_metric": None})
    given["teachers"] = [unheard | {"lead": 0.99}, heard]
    on_two_ranks(given, base, tmp_path / "two")
    run(given, base, tmp_path / "one")
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    lines = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("two", "one")]
    assert (
        [line["silent"] for line in lines[0] if "silent" in line]
        == [line["silent"] for line in lines[1] if "silent" in line]
        != []
    )
    assert all(line["teachers"]["other"]["kd"] == 0 < line["teachers"]["same"]["kd"] for line in lines[0] if "teachers" in line)


def test_bf16_is_the_same_however_the_student_is_spread(base, values):
    """Autocast's: products in bf16, the residual stream in float32. FSDP's own policy would round the stream too."""
    spread = {}
    for sharding in ("ddp", "fsdp"):
        bf16 = {"precision": "bf16", "sharding": sharding, "max_steps": 2, "save_steps": None, "eval_steps": None}
        on_two_ranks(changed(values, training=bf16, data={"validation": []}), base, base / f"bf16-{sharding}")
        spread[sharding] = losses(base / f"bf16-{sharding}")
    assert len(spread["ddp"]) == 2
    for ours, theirs in zip(spread["fsdp"], spread["ddp"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_two_ranks_resume(base, values, spread, tmp_path):
    """From the checkpoint of step 2, as if killed after it."""
    sharding, unbroken = spread
    if sharding == "ddp" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("before 5.18 transformers loads an optimizer onto 'cpu:0', which torch does not know; on GPUs it goes on")
    out = tmp_path / "killed"
    shutil.copytree(unbroken, out)
    weights = [path for path in (out / "checkpoints" / "checkpoint-2").iterdir() if "model" in path.name]
    assert [path.name for path in weights] == ["model.safetensors"]  # once, however it is spread
    (out / "checkpoints" / "checkpoint-3" / "checksums.json").unlink()
    on_two_ranks(changed(values, training={"sharding": sharding}), base, out)
    assert json.loads((out / "summary.json").read_text())["resumed_from"] == 2
    assert losses(out) == losses(unbroken)


def test_another_number_of_processes_goes_on_or_says_why_not(base, values, alone, spread, tmp_path):
    """An optimizer under fsdp has another form than one in one process; accelerate would end in a traceback at every rerun."""
    sharding, unbroken = spread
    out, given = shutil.copytree(unbroken, tmp_path / "out"), changed(values, training={"sharding": sharding})
    (out / "checkpoints" / "checkpoint-3" / "checksums.json").unlink()
    if sharding == "ddp":
        assert run(given, base, out).resumed_from == 2
        assert losses(out)[-1] == pytest.approx(losses(unbroken)[-1], rel=1e-5)
        return
    with pytest.raises(
        InputError, match=r"/checkpoint-2: was saved by several processes under fsdp, and this training has one; "
    ):
        run(given, base, out)
    with pytest.raises(InputError, match=r"/checkpoint-2: was saved by one process, and this training has several; "):
        check_optimizer(alone[0] / "checkpoints" / "checkpoint-2", sharded=True)


def test_distill_starts_a_process_per_gpu_by_itself(base, values, alone, monkeypatch):
    """On CPUs here: what counts as GPUs is made up, the processes are not."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    out = base / "launched"
    summary = run(changed(values, training={"max_steps": 1}), base, out, baseline=True)
    assert summary.ranks == 2
    (step, loss, _), (_, first, _) = losses(out)[0], losses(alone[0])[0]
    assert step == 1
    assert loss == pytest.approx(first / 2, rel=1e-4)  # CE alone: the other half was KD, scaled to its size


def test_bad_input_of_a_rank_is_bad_input_of_the_run(base, values, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    uneven = changed(values, training={"global_batch_size": 3})
    with pytest.raises(
        InputError, match=r"^training\.global_batch_size: 3 rows do not divide over 2 ranks by micro-batches of 1$"
    ):
        run(uneven, base, base / "uneven", baseline=True)
