"""Numbers that are not finite: found in a step, told by name, never saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tests.support.training_run import FIVE_STEPS, changed, prepare, run, steps
from xtoken_core.data.reading import load_rows
from xtoken_core.errors import InputError, NonFiniteError
from xtoken_core.models import final_hidden, load_model
from xtoken_core.spec import DistillationSpec
from xtoken_core.training.trainer import DistillationTrainer
from xtoken_core.workflow.evaluations import evaluate_group
from xtoken_core.workflow.scoring import score_teacher
from xtoken_core.workflow.subjects import Group


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("nonfinite")


@pytest.fixture(scope="module")
def values(base):
    return prepare(base, training=FIVE_STEPS | {"save_steps": 1, "eval_steps": 1})


def assert_finite(out: Path) -> None:
    """Every student that a run has saved, in checkpoints too, is finite."""
    saved = sorted(out.rglob("model.safetensors"))
    assert saved
    for path in saved:
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


def test_a_training_that_diverges_ends_within_two_steps(base, values, tmp_path, fault):
    wild = changed(values, training={"learning_rate": 1e30, "max_grad_norm": 1e30})
    with pytest.raises(NonFiniteError, match=r"^step 2: student: its .* not finite; last good checkpoint: \S+$") as told:
        run(wild, base, tmp_path)
    assert_finite(tmp_path)
    fault("learning rate 1e30", "ends within two steps, nothing that is not finite is saved", told.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("who", ["student", "other", "same"])
def test_a_model_with_such_weights_is_bad_input(base, values, tmp_path, fault, who, number):
    model = shutil.copytree(base / who, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = number
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    spec = (
        changed(values, student={"model": str(model)})
        if who == "student"
        else values
        | {"teachers": [teacher | ({"model": str(model)} if teacher["id"] == who else {}) for teacher in values["teachers"]]}
    )
    by = "" if who == "student" else rf"teachers\.\d \({who}\): "
    with pytest.raises(
        InputError, match=rf"^{by}{model}: its weights hold numbers that are not finite, in .*norm\.weight$"
    ) as told:
        run(spec, base, tmp_path / "out")
    fault(f"{number} in the weights of {who}", "bad input that names model and weight", told.value)


def test_a_teacher_whose_outputs_overflow_is_named(base, values, tmp_path, fault):
    model = shutil.copytree(base / "same", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    loaded, ids = load_model(str(model)), torch.from_numpy(load_rows(base / "rows" / "train")[0]["student_ids"]).long()
    with torch.no_grad():  # the last norm has weights of 1: what they multiply
        tried, text = (final_hidden(loaded, i[None])[0].abs().amax(0) for i in (torch.arange(4), ids))
    most = int((text / tried).where(tried > 1, 0).argmax())
    weights["model.norm.weight"][most] = 3.2e38 / tried[most]  # the few tokens that every model is tried with just fit
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    spec = values | {"teachers": [values["teachers"][0], values["teachers"][1] | {"model": str(model)}]}
    with pytest.raises(
        NonFiniteError, match="^step 1: teacher same: its outputs are not finite; last good checkpoint: none$"
    ) as told:
        run(spec, base, tmp_path / "out")
    fault("a teacher whose outputs overflow", "ends in a step, the teacher is named", told.value)


@pytest.fixture
def bad_batch(monkeypatch):
    """The gradients of step 3 hold a NaN."""
    check = DistillationTrainer.check_step

    def spoilt(trainer) -> None:
        if trainer.state.global_step == 2:
            next(trainer.student.parameters()).grad[5, 0] = float("nan")
        check(trainer)

    monkeypatch.setattr(DistillationTrainer, "check_step", spoilt)


def test_a_bad_batch_ends_the_run_with_the_last_good_checkpoint(base, values, tmp_path, bad_batch, fault):
    with pytest.raises(NonFiniteError, match=r"^step 3: student: its gradients .*: \S+/checkpoint-2$") as told:
        run(values, base, tmp_path)
    assert_finite(tmp_path)
    fault("a NaN in the gradients of a step", "ends, the last good checkpoint is named", told.value)


def test_a_bad_batch_is_skipped_by_rule_and_counted(base, values, tmp_path, bad_batch, capfd, fault):
    summary = run(changed(values, training={"skip_nonfinite": 1}), base, tmp_path)
    assert (summary.steps, summary.skipped_steps) == (5, 1)
    line = "step 3: skipped (1 of 1), student: its gradients are not finite"
    assert line in capfd.readouterr().err
    before, after = (load_file(tmp_path / "checkpoints" / f"checkpoint-{n}" / "model.safetensors") for n in (4, 5))
    assert any(not torch.equal(before[name], after[name]) for name in after)  # it goes on learning
    assert all(line["loss"] is not None for line in steps(tmp_path))
    fault("the same with skip_nonfinite: 1", "skipped, counted, told", line)


def test_a_skipped_step_leaves_the_weights_as_they_were(base, values, tmp_path, bad_batch):
    run(changed(values, training={"skip_nonfinite": 1, "max_steps": 3}), base, tmp_path, baseline=True)
    before, after = (load_file(tmp_path / "checkpoints" / f"checkpoint-{n}" / "model.safetensors") for n in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in after)


@pytest.fixture(scope="module")
def overflowing(base, values):
    """A model of the student's vocabulary that is finite but for texts with one token, as of a width that overflows there."""
    tokens = [set(load_rows(base / "rows" / split)[0]["student_ids"].tolist()) for split in ("train", "validation")]
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(tie_word_embeddings=False, **sizes))
    model.transformer.wte.weight.data[max(tokens[0] & tokens[1])] = 3e38
    folder = shutil.copytree(base / "same", base / "overflowing")
    model.save_pretrained(folder)
    load_model(str(folder))  # nothing is found when it is loaded
    return folder


def test_an_evaluation_that_is_not_finite_is_no_result(base, values, overflowing, tmp_path, fault):
    spec = DistillationSpec.model_validate(changed(values, student={"model": str(overflowing)}))
    with pytest.raises(
        NonFiniteError, match=r"^student_before: its cross-entropy of \S+/held-out.jsonl:1 is not finite$"
    ) as told:
        evaluate_group(spec, Group.BEFORE, tmp_path)
    assert list(tmp_path.iterdir()) == []
    fault("a model overflows on a held-out text", "the evaluation fails by name", told.value)


def test_scores_that_are_not_finite_are_not_stored(base, values, overflowing, tmp_path, fault):
    teacher = {"id": "same", "model": str(overflowing), "scores": {"top_k": 8}}
    spec = DistillationSpec.model_validate(values | {"teachers": [teacher]})
    with pytest.raises(NonFiniteError, match=r"^teachers\.same: its outputs for row 0 are not finite$") as told:
        score_teacher(spec, "same", base / "rows", tmp_path)
    assert list(tmp_path.iterdir()) == []
    fault("a teacher overflows on a training row", "scoring fails by name, nothing is stored", told.value)
