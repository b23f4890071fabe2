"""A teacher that does not fit one GPU: spread over two and four it gives the whole model's logits and teaches; a part that dies ends all.

How much of its GPU a teacher's process may take is limited, so that a model of 2.8 B is too large on any.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.benchmarks.training import LLAMA_3B
from tests.distributed.test_sharded_teacher import hands_over_the_whole_models_logits
from tests.support.gpus import first_gpus, needs_gpus
from tests.support.processes import ended, forked
from tests.support.tiny import tiny_tokenizer
from tests.support.training_run import changed, losses, prepare, run, start, steps
from tests.teachers.test_teachers import IDS, micro_batches, setup
from xtoken_core.errors import RunError
from xtoken_core.models import load_model
from xtoken_core.teachers import handle
from xtoken_core.teachers.pool import TeacherPool
from xtoken_core.teachers.setup import TeacherError
from xtoken_core.teachers.worker import teacher_main
from xtoken_core.training import teachers
from xtoken_core.training.launch import on_every_gpu

pytestmark = needs_gpus(1)

ROOM = 4 * 2**30
"""Bytes that a teacher's process may take; the weights are 5.6e9."""
STEPS = {"global_batch_size": 4, "micro_batch_size": 1, "save_steps": None, "eval_steps": None, "scheduler": "constant"}
ON_SEVERAL = [pytest.param(count, marks=needs_gpus(count)) for count in (2, 4)]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of the layers of Llama-3.2-3B, with random weights and the vocabulary of the tiny models."""
    folder, tokenizer = tmp_path_factory.mktemp("large"), tiny_tokenizer(400)
    own = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig.from_dict(LLAMA_3B.to_dict() | own)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def values(base):
    """A run with one teacher, of the student's vocabulary, in bf16, two steps of four rows."""
    spec = prepare(base, training=STEPS | {"max_steps": 2, "precision": "bf16"})
    return spec | {"teachers": spec["teachers"][1:], "data": spec["data"] | {"validation": []}}


@pytest.fixture(scope="module")
def alone(base, values, large):
    """The same run on one GPU, all of whose memory the large teacher may take: loss, gradient norm and KD of each step."""
    start(taught_by(large, values), base, base / "alone", CUDA_VISIBLE_DEVICES=first_gpus(1)).finish()
    return told(base / "alone")


def told(out):
    return [(line["loss"], line["grad_norm"], line["teachers"]["same"]["kd"]) for line in steps(out)]


def taught_by(model, values):
    return values | {"teachers": [values["teachers"][0] | {"model": str(model)}]}


def held(pipe, given, student, environment):
    """The body of a teacher's process that may take only a part of its GPU."""
    os.environ.clear()  # the server that it is forked from may see other GPUs
    os.environ.update(environment)
    share = ROOM / torch.cuda.get_device_properties(given.device).total_memory
    torch.cuda.set_per_process_memory_fraction(share, given.device)
    teacher_main(pipe, given, student, environment)


def spread(values, base, out, limit=False):
    """A rank's training whose teacher is spread over the ranks, whatever its size. limit: see `held`."""
    body = held if limit else teacher_main
    with mock.patch.object(handle, "teacher_main", body), mock.patch.object(teachers, "LARGEST_SHARE", 1e-9):
        run(values, base, out)


def struck(values, base, out, whom):
    """The same; after the first step rank 1 loses its teacher, or kills itself."""

    def strike():
        while not losses(out):
            time.sleep(0.05)
        [teacher] = [process for process in multiprocessing.active_children() if process.name.startswith("teachers.")]
        os.kill({"teacher": teacher.pid, "rank": os.getpid()}[whom], signal.SIGKILL)

    if os.environ["RANK"] == "1":
        threading.Thread(target=strike, daemon=True).start()
    spread(values, base, out)


@pytest.mark.xdist_group("logits of a large teacher")  # which is made once for all of them
def test_on_one_gpu_it_does_not_fit_and_says_so(large):
    whole = setup(large, "teachers.0 (large)", dtype=torch.bfloat16, device=torch.device("cuda", 0))
    with (
        mock.patch.object(handle, "teacher_main", held),
        pytest.raises(TeacherError, match=r"^teachers\.0 \(large\): OutOfMemoryError: CUDA out of memory"),
        TeacherPool([whole]) as pool,
    ):
        pool.run([micro_batches((1, 4))])


@pytest.mark.xdist_group("logits of a large teacher")
@pytest.mark.parametrize("gpus", ON_SEVERAL)
def test_spread_over_several_it_hands_over_the_whole_models_logits(large, gpus):
    model = load_model(str(large), torch.bfloat16).to("cuda")

    @torch.no_grad()
    def own(_, batch):
        return model(torch.from_numpy(batch["input_ids"]).to("cuda")).logits[..., :IDS]

    devices = [f"cuda:{number}" for number in range(gpus)]
    with mock.patch.object(handle, "teacher_main", held):
        assert hands_over_the_whole_models_logits(large, devices, own, torch.bfloat16, rtol=0, atol=0.25)


@pytest.mark.xdist_group("training with a large teacher")
@pytest.mark.parametrize("gpus", ON_SEVERAL)
def test_spread_over_several_it_teaches_as_on_one(base, values, large, alone, gpus):
    on_every_gpu(gpus, spread, (taught_by(large, values), base, base / f"on-{gpus}", True))
    for ours, theirs in zip(told(base / f"on-{gpus}"), alone, strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize(
    ("whom", "named"), [("teacher", r"^teachers\.0 \(same\): "), ("rank", r"^rank 1: its process died \(SIGKILL")]
)
@needs_gpus(2)
def test_a_part_that_dies_ends_all_others(base, values, tmp_path, whom, named):
    """Those of the other rank wait in a collective that never ends."""
    others, endless = set(forked(os.getpid())), changed(values, training={"max_steps": 100_000})
    with pytest.raises(RunError, match=named):
        on_every_gpu(2, struck, (endless, base, tmp_path, whom))
    assert ended(set(forked(os.getpid())) - others)
