"""The trainer: one loss however the step is split, resumption, packing, learnable W, what it leaves on disk."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.processes import forked
from tests.support.training_run import FIVE_STEPS, OTHER_IDS, changed, losses, prepare, run, start, start_and_kill, steps
from xtoken_core.configs import compute_dtype
from xtoken_core.data.batch import Collator
from xtoken_core.data.reading import Shuffled, load_rows
from xtoken_core.errors import InputError
from xtoken_core.losses import StepTotals, batch_counts
from xtoken_core.models import Loaded, final_hidden, head_logits, load_model
from xtoken_core.projection import Projection
from xtoken_core.spec import DistillationSpec
from xtoken_core.teachers.setup import TeacherError
from xtoken_core.tokenization import TokenTable, load_tokenizer
from xtoken_core.training import distill as training
from xtoken_core.training.settings import training_arguments
from xtoken_core.training.student import MicroBatch, Student
from xtoken_core.training.teachers import ReadyTeacher

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def values(base):
    """Two teachers, weighted by their CE, so that a step has everything: scores, counts, dynamic scale; W is trained."""
    spec = prepare(
        base,
        loss={"weight_metric": "ce"},
        training=FIVE_STEPS,
    )
    spec["teachers"][0]["projection"] = {"learnable": True, "learning_rate": 0.05}
    return spec


@pytest.fixture(scope="module")
def unbroken(base, values):
    out = base / "unbroken"
    return out, run(values, base, out)


def test_a_run_leaves_a_student_that_loads_and_a_log_that_tells_all(base, values, unbroken):
    out, summary = unbroken
    for name in ("last", "best"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out / name), AutoTokenizer.from_pretrained(out / name)
        assert model(torch.tensor([tokenizer("In the").input_ids])).logits.isfinite().all()
    lines = steps(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    expected = {"loss", "ce", "kd", "scale", "accuracy", "learning_rate", "grad_norm"}
    expected |= {"tokens", "tokens_per_second", "seconds_step", "seconds_teachers", "memory_gib"}
    teachers = lines[0]["teachers"]
    assert expected <= set(lines[0]) and teachers.keys() == {"other", "same"}
    assert all({"kd", "weight", "seconds"} <= teacher.keys() for teacher in teachers.values())
    assert lines[0]["loss"] == pytest.approx(
        2 * lines[0]["ce"], rel=1e-5
    )  # dynamic scale of the step's own sums: KD as large as CE
    assert lines[1]["scale"] == pytest.approx(4 / 5 * lines[0]["ce"] / lines[0]["kd"], rel=1e-9)  # a fifth of the run is over
    assert teachers["other"]["weight"] + teachers["same"]["weight"] == pytest.approx(1)
    validation = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if "validation" in line]
    assert [line["step"] for line in validation] == [0, 2, 4, 5]
    best = min(validation[1:], key=lambda line: line["validation_bits_per_byte"])
    assert summary.best_step == best["step"]
    assert summary.best_validation_bits_per_byte == best["validation_bits_per_byte"]
    assert json.loads((out / "summary.json").read_text())["steps"] == 5
    assert list((out / "tensorboard").glob("events*"))


def test_validation_is_the_cross_entropy_of_the_text_over_its_bytes(base, unbroken):
    """The end of the document is a target without bytes, and is not measured."""
    out, summary = unbroken
    model, bits, num_bytes = load_model(str(out / "last")), 0.0, 0
    for row in load_rows(base / "rows" / "validation"):
        ids, mask = (
            torch.from_numpy(row["student_ids"]).long(),
            torch.from_numpy(row["student_mask"] * (row["student_bytes"] > 0)).bool(),
        )
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        nats = -log_probs.gather(1, ids[1:, None])[:, 0][mask[1:]].double()
        bits += nats.sum().item() / torch.tensor(2.0).log().item()
        num_bytes += int(row["student_bytes"][1:][mask[1:].numpy()].sum())
    assert summary.last_validation_bits_per_byte == pytest.approx(bits / num_bytes, rel=1e-5)


def test_learned_w_is_saved_as_a_projection_and_has_moved(base, unbroken):
    out, _ = unbroken
    tables = [TokenTable.from_tokenizer(load_tokenizer(str(base / name))) for name in ("student", "other")]
    before, after = (
        Projection.load(base / "w.safetensors"),
        Projection.load(out / "last" / "projection-other.safetensors", *(table.fingerprint for table in tables)),
    )
    assert torch.equal(before.indices, after.indices)
    assert torch.allclose(after.weights.sum(1)[(after.indices >= 0).any(1)], torch.tensor(1.0))
    several = (before.indices >= 0).sum(1) > 1
    assert (after.weights - before.weights)[several].abs().max() > 1e-3
    assert torch.allclose(after.weights[~several], before.weights[~several])


def test_a_killed_run_goes_on_as_if_nothing_had_happened(base, values, unbroken):
    """Bitwise: weights, optimizer, scheduler, data position, learned W, dynamic scale, the best student, the log."""
    out = base / "killed"
    start_and_kill(values, base, out)
    assert not (out / "summary.json").exists()
    summary = run(values, base, out)
    assert summary.resumed_from == 2
    assert losses(out) == losses(unbroken[0])
    ours, theirs = (load_file(folder / "last" / "model.safetensors") for folder in (out, unbroken[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    learned = [Projection.load(folder / "last" / "projection-other.safetensors").weights for folder in (out, unbroken[0])]
    assert torch.equal(*learned)
    assert summary.best_step == unbroken[1].best_step


def test_nothing_of_another_run_is_taken_up(base, values):
    """Neither checkpoints of another spec, nor the best student of a run before, where this one has no validation."""
    out = base / "reused"
    short = changed(values, training={"max_steps": 2, "save_steps": 1, "eval_steps": None}, data={"validation": []})
    run(short, base, out, baseline=True)
    other = changed(short, training={**short["training"], "learning_rate": 0.5})
    with pytest.raises(InputError, match=f"^{out}/checkpoints: holds checkpoints of another spec"):
        run(other, base, out, baseline=True)
    shutil.rmtree(out / "checkpoints")
    run(other, base, out, baseline=True)
    best, last = (load_file(out / name / "model.safetensors") for name in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_rows_that_cannot_be_read_by_a_worker_are_one_line(base, values, monkeypatch):
    class Lost(list):
        def __getitem__(self, index):
            raise InputError("s3://bucket/rows/3: no such file or folder")

    arguments = training.training_arguments
    monkeypatch.setattr(training, "rows_of_shards", lambda *_, **__: Lost(range(8)))
    monkeypatch.setattr(training, "training_arguments", lambda *given: replace(arguments(*given), dataloader_num_workers=1))
    with pytest.raises(InputError, match="^s3://bucket/rows/3: no such file or folder$"):
        run(changed(values, training={"max_steps": 1, "eval_steps": None}), base, base / "lost", baseline=True)


def test_a_run_resumes_elsewhere_from_kept_checkpoints(base, values):
    kept, first, second = base / "kept", base / "first", base / "second"
    short = changed(values, training={"max_steps": 5, "save_steps": 4})
    run(short, base, first, baseline=True, checkpoint_uri=str(kept))
    assert sorted(folder.name for folder in kept.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    summary = run(short, base, second, baseline=True, checkpoint_uri=str(kept))
    assert summary.resumed_from == 5
    assert losses(second) == losses(first)
    assert (second / "best" / "model.safetensors").exists()


def test_the_loss_does_not_depend_on_the_micro_batches(base, values, unbroken):
    out = base / "split"
    run(changed(values, training={"micro_batch_size": 1}), base, out)
    for ours, theirs in zip(losses(out)[:3], losses(unbroken[0])[:3], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


@pytest.fixture(scope="module")
def baseline(base, values):
    out = base / "baseline"
    return out, run(values, base, out, baseline=True)


def test_the_baseline_sees_the_same_rows_and_starts_no_teacher(unbroken, baseline):
    out, summary = baseline
    lines, distilled = steps(out), steps(unbroken[0])
    assert summary.modes == {}
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in distilled]
    assert lines[0]["ce"] == pytest.approx(distilled[0]["ce"], rel=1e-6)
    assert all(line["loss"] == line["ce"] and line["kd"] == 0 for line in lines)


@pytest.mark.parametrize("option", [{"activation_checkpointing": True}, {"attention": "eager"}, {"log_steps": 2}], ids=str)
def test_options_of_memory_and_speed_change_nothing_else(base, values, baseline, option):
    out = base / "-".join(option)
    run(changed(values, training={"max_steps": 2, **option}), base, out, baseline=True)
    expected = {step: (loss, norm) for step, loss, norm in losses(baseline[0])}
    assert losses(out)[-1][0] == 2
    for step, loss, norm in losses(out):
        assert (loss, norm) == pytest.approx(expected[step], rel=1e-4)


def test_a_dead_teacher_ends_the_run(base, values):
    spec = changed(values, training={"max_steps": 100_000, "save_steps": None, "eval_steps": None})
    student = start(spec, base, base / "dead")
    while not losses(base / "dead"):
        assert student.process.is_alive()
        time.sleep(0.1)
    forked(os.getpid())[-1].kill()  # its second teacher: both are forked from the server of the tests
    errors = student.output.read()
    student.process.join()
    assert student.process.exitcode == 1
    assert f"{TeacherError.__name__}: teachers.1 (same): its process died (SIGKILL" in errors


@pytest.mark.parametrize("mode", ["p_kl", "partition_kl"])
def test_a_packed_row_gives_the_loss_of_its_documents_one_by_one(base, values, mode):
    plain = changed(values, loss={"vocab_topk": 16, "weight_metric": None})
    plain["teachers"] = [{**teacher, "projection": {}} if "projection" in teacher else teacher for teacher in values["teachers"]]
    spec = DistillationSpec.model_validate(changed(plain, loss={"mode": mode, "dynamic_scaling": False}))
    rows, collate = load_rows(base / "rows" / "train"), Collator.for_rows(spec, base / "rows" / "train")
    documents = [rows[i] for i in range(4)]
    models = {name: load_model(str(base / name), torch.float64) for name in ("student", "other", "same")}
    w = Projection.load(base / "w.safetensors")
    teachers = [
        ReadyTeacher("other", setup=None, fingerprint="", mode=mode, projection=w),
        ReadyTeacher("same", setup=None, fingerprint=""),
    ]
    tokenizer = load_tokenizer(str(base / "student"))
    student = Student(Loaded.of(models["student"], tokenizer, "student"), spec.loss, {})

    def loss(batches):
        micro_batches, counts = [], []
        for batch in batches:
            heard = {}
            for teacher, side, ids in zip(teachers, batch.teachers, (OTHER_IDS, 400), strict=True):
                model = models[teacher.id]
                with torch.no_grad():
                    logits = head_logits(model, side.unpacked(final_hidden(model, **side.model_inputs())), ids)
                heard[teacher.id] = teacher.batch(logits, side)
            counts.append(batch_counts(*batch.masks, list(heard.values()), spec.loss))
            micro_batches.append(MicroBatch(batch, heard))
        totals = StepTotals.from_sums(sum(counts), list(heard.values()), spec.loss)
        student.zero_grad()
        shares = [student(micro_batch, totals)["loss"] for micro_batch in micro_batches]
        sum(shares).backward()
        return sum(shares).item(), models["student"].get_input_embeddings().weight.grad.clone()

    packed, packed_gradient = loss([collate([documents[:3], documents[3:]])])
    apart, gradient = loss([collate([document]) for document in documents])
    assert packed == pytest.approx(apart, rel=1e-9)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-7, atol=1e-10)


def test_partition_kl_is_the_same_through_every_transport(base, values):
    """Hidden states or logits, packed or not: one loss, step by step."""
    found = {}
    for transport in ("hidden", "logits"):
        teachers = [{**teacher, "transport": transport} for teacher in values["teachers"]]
        teachers[0]["projection"] = {}
        spec = changed(
            values | {"teachers": teachers}, loss={"mode": "partition_kl"}, training={"max_steps": 2, "eval_steps": None}
        )
        run(spec, base, base / transport)
        found[transport] = losses(base / transport)
    for hidden, logits in zip(found["hidden"], found["logits"], strict=True):
        assert hidden == pytest.approx(logits, rel=1e-5) and hidden[1] > 0


def test_a_mode_that_was_worse_than_no_distillation_says_so(base, values, caplog, capsys):
    teachers = [{**values["teachers"][0], "projection": {}}]
    spec = changed(values | {"teachers": teachers}, loss={"mode": "h_kl"}, training={"max_steps": 1, "eval_steps": None})
    run(spec, base, base / "h_kl")
    assert "teacher other: h_kl made a worse student than no distillation" in caplog.text
    assert "kd (a score, no distance)" in capsys.readouterr().err


def test_a_packed_run_trains(base, values):
    out = base / "packed"
    run(changed(values, data={"packing": True}, training={"max_steps": 1, "global_batch_size": 2, "eval_steps": None}), base, out)
    assert steps(out)[0]["tokens"] > 0


def test_every_epoch_is_a_new_order_of_all_rows_that_the_seed_fixes():
    rows = list(range(7))
    items = [Shuffled(rows, 21, seed=3)[i] for i in range(21)]
    assert items == [Shuffled(rows, 21, seed=3)[i] for i in range(21)]
    epochs = [items[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert items != [Shuffled(rows, 21, seed=4)[i] for i in range(21)]


def test_epochs_become_steps(values, tmp_path):
    training = {name: value for name, value in values["training"].items() if name != "max_steps"} | {"epochs": 2}
    args = training_arguments(DistillationSpec.model_validate(values | {"training": training}), tmp_path, rows=9)
    assert (args.max_steps, args.train_batch_size * args.gradient_accumulation_steps) == (5, 4)


def test_rows_that_do_not_divide_over_the_ranks_are_named(values, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        InputError, match=r"^training\.global_batch_size: 4 rows do not divide over 3 ranks by micro-batches of 2$"
    ):
        training_arguments(DistillationSpec.model_validate(values), tmp_path, rows=1)


@pytest.mark.parametrize(
    "known, dtype", [({"amx_bf16": True}, torch.bfloat16), ({"avx2": True, "avx512_bf16": False}, torch.float32)]
)
def test_precision_auto_is_bf16_only_where_the_processor_has_it(known, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert compute_dtype("auto") == dtype
    assert (compute_dtype("bf16"), compute_dtype("fp32")) == (torch.bfloat16, torch.float32)
