"""Before the first step teachers and student compile side by side; what they then compute is what they would have anyway."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch

from tests.support.tiny import tiny_model
from tests.support.training_run import FIVE_STEPS, losses, prepare, run
from tests.teachers.test_teachers import dense, micro_batches, own_logits, setup
from xtoken_core.errors import RunError
from xtoken_core.losses import HiddenLogits
from xtoken_core.teachers import handle
from xtoken_core.teachers.pool import TeacherPool
from xtoken_core.teachers.setup import TeacherError
from xtoken_core.teachers.weights import Weights
from xtoken_core.teachers.worker import teacher_main
from xtoken_core.training import step
from xtoken_core.training.launch import on_every_gpu
from xtoken_core.training.trainer import DistillationTrainer

FIRST_STEPS = FIVE_STEPS | {"max_steps": 2, "save_steps": None}
NO_MEMORY = [torch.OutOfMemoryError(), RuntimeError("Triton Error [CUDA]: out of memory")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("teacher"), 400)


@pytest.fixture
def uncompiled(monkeypatch):
    """What compilation changes is the speed only; it would take a quarter of a minute here."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def test_all_are_asked_before_one_is_waited_for(folder, uncompiled):
    """With the first one standing still the call returns; once it goes on, all give what they would have given without."""
    batches = micro_batches((2, 9), (1, 14))
    with TeacherPool([setup(folder, name, compile=True) for name in ("one", "two")]) as pool:
        first = pool.teachers[0]._process.pid
        os.kill(first, signal.SIGSTOP)
        assert pool.warm_up([batches] * 2)
        assert pool.warm_up([batches] * 2)  # is asked once
        os.kill(first, signal.SIGCONT)
        for run_of_one in pool.run([batches] * 2):
            for batch, logits in zip(batches, run_of_one.logits, strict=True):
                torch.testing.assert_close(dense(logits), own_logits(folder, batch))
        assert [event.what for event in pool.events] == ["run", "run"]
        assert not pool.warm_up([batches] * 2)  # they have run


def test_a_teacher_that_compiles_nothing_is_not_asked(folder):
    with TeacherPool([setup(folder)]) as pool:
        assert not pool.warm_up([micro_batches((1, 4))])


def test_a_teacher_that_fails_meanwhile_ends_the_run_by_name(folder, uncompiled):
    unknown = [{"input_ids": np.full((1, 4), 10**6)}]
    with (
        pytest.raises(TeacherError, match=r"^two: IndexError: "),
        TeacherPool([setup(folder, name, compile=True) for name in ("one", "two")]) as pool,
    ):
        pool.warm_up([micro_batches((1, 4)), unknown])
        pool.run([micro_batches((1, 4))] * 2)


def test_made_up_outputs_have_the_form_of_real_ones(folder):
    ways = [{"transport": "hidden"}, {"transport": "logits"}, {"transport": "topk", "top_k": 7}]
    [batch] = micro_batches((2, 9))
    with TeacherPool([setup(folder, **way) for way in ways]) as pool:
        for teacher, given in zip(pool.teachers, pool.run([[batch]] * 3), strict=True):
            made_up, [real] = teacher.made_up(batch), given.logits
            assert type(made_up) is type(real)
            assert made_up.shape == real.shape
            if not isinstance(real, torch.Tensor):
                for ours, theirs in zip(made_up.tensors, real.tensors, strict=True):
                    assert (ours is None) == (theirs is None)
                    assert ours is None or (ours.shape, ours.dtype, ours.stride()) == (
                        theirs.shape,
                        theirs.dtype,
                        theirs.stride(),
                    )
            if isinstance(real, HiddenLogits):
                assert made_up.weight.data_ptr() == real.weight.data_ptr()


def tiny_with_dropout(folder, **sections):
    """A prepared run with dropout, a trained W, and a teacher that hands over its largest logits."""
    values = prepare(folder, loss={"weight_metric": "ce"}, **sections)
    config = folder / "student" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.2}))
    values["teachers"][0]["projection"] = {"learnable": True, "learning_rate": 0.05}
    values["teachers"][1] |= {"transport": "topk", "top_k": 20}
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": FIRST_STEPS | {"activation_checkpointing": True}},
        {"student": {"lora": {"rank": 2}}, "data": {"packing": True}},
    ],
    ids=["topk", "checkpointing", "lora, packed"],
)
def test_a_rehearsed_training_is_the_same_to_the_last_bit(tmp_path, changes):
    """Dropout draws what it would have drawn, no gradient stays, a trained W moves as it would, and the first step's own sums give the same scale."""
    values = tiny_with_dropout(tmp_path, **{"training": FIRST_STEPS} | changes)
    run(values, tmp_path, tmp_path / "plain")
    rehearsed = mock.Mock(side_effect=step._rehearse)
    with (
        mock.patch.object(TeacherPool, "warm_up", lambda pool, _: pool._runs == 0),
        mock.patch.object(step, "_rehearse", rehearsed),
    ):
        run(values, tmp_path, tmp_path / "rehearsed")
    assert rehearsed.call_count == 1
    assert losses(tmp_path / "rehearsed") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_so_is_one_that_goes_on_from_a_checkpoint(tmp_path):
    values, out = tiny_with_dropout(tmp_path, training=FIVE_STEPS), tmp_path / "resumed"
    run(values, tmp_path, tmp_path / "plain")
    with mock.patch.object(DistillationTrainer, "check_step", side_effect=[None, None, RunError]), pytest.raises(RunError):
        run(values, tmp_path, out)
    with mock.patch.object(TeacherPool, "warm_up", lambda pool, _: pool._runs == 0):
        assert run(values, tmp_path, out).resumed_from == 2
    assert losses(out) == losses(tmp_path / "plain")


def rehearsed_rank(values, base, out):
    """A rank's training that begins with a rehearsal, for which the second rank's memory does not suffice."""
    error = torch.OutOfMemoryError if os.environ["RANK"] == "1" else None
    with (
        mock.patch.object(TeacherPool, "warm_up", lambda pool, _: pool._runs == 0),
        mock.patch.object(step.Teaching, "rehearsal", autospec=True, side_effect=error or step.Teaching.rehearsal),
    ):
        run(values, base, out)


@pytest.mark.slow
def test_so_is_one_of_two_ranks(tmp_path):
    """DDP sums no gradient of a rehearsal, and no rank waits for another's: the second has none."""
    values = prepare(tmp_path, teachers=1, training=FIRST_STEPS | {"micro_batch_size": 1})
    on_every_gpu(2, run, (values, tmp_path, tmp_path / "plain"))
    on_every_gpu(2, rehearsed_rank, (values, tmp_path, tmp_path / "rehearsed"))
    assert losses(tmp_path / "rehearsed") == losses(tmp_path / "plain")


def starved(error, *arguments):
    """The body of a teacher's process in which nothing comes onto the device in time for a warm-up."""
    with mock.patch.object(Weights, "onload", side_effect=error):
        teacher_main(*arguments)


@pytest.mark.parametrize("error", NO_MEMORY)
def test_a_teacher_whose_memory_does_not_suffice_compiles_in_its_run(folder, uncompiled, error):
    [batch] = micro_batches((2, 9))
    with (
        mock.patch.object(handle, "teacher_main", partial(starved, error)),
        TeacherPool([setup(folder, compile=True)]) as pool,
    ):
        assert pool.warm_up([[batch]])
        [given] = pool.run([[batch]])
        torch.testing.assert_close(dense(given.logits[0]), own_logits(folder, batch))


@pytest.mark.slow
@pytest.mark.parametrize("error", NO_MEMORY)
def test_memory_that_does_not_suffice_ends_no_training(tmp_path, error):
    values = prepare(tmp_path, teachers=1, training={"max_steps": 1})
    with (
        mock.patch.object(TeacherPool, "warm_up", lambda pool, _: pool._runs == 0),
        mock.patch.object(step.Teaching, "rehearsal", side_effect=error),
    ):
        assert run(values, tmp_path, tmp_path / "out").steps == 1
