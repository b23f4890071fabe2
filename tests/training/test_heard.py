"""Where teachers are heard: as long as they are ahead of the student on validation text, domain by domain."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.support.training_run import changed, prepare, run, steps
from xtoken_core.data.batch import Collator
from xtoken_core.data.reading import load_rows
from xtoken_core.errors import InputError
from xtoken_core.models import Loaded, load_model
from xtoken_core.report.cautions import cautions
from xtoken_core.report.run import Run
from xtoken_core.spec import DistillationSpec
from xtoken_core.teachers.pool import TeacherPool
from xtoken_core.tokenization import load_tokenizer
from xtoken_core.training import heard
from xtoken_core.training.checkpoints import Progress
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.training.scored import scored_teachers, with_measurements
from xtoken_core.training.step import Teaching
from xtoken_core.training.teachers import ReadyTeacher, ready_teachers
from xtoken_core.training.validation import HeldOut
from xtoken_core.workflow.scoring import score_teacher

CODE = "def f(x):\n    return x + 1\n" * 30
TRAINING = {
    "max_steps": 12,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "eval_steps": 3,
    "scheduler": "constant",
    "learning_rate": 5e-3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("heard")


@pytest.fixture(scope="module")
def values(base):
    """Training text of no domain and of `code`, validation text of both; teachers are heard while they are ahead."""
    for name in ("code", "more"):
        (base / name).mkdir()
    (base / "code" / "0.txt").write_text(CODE)
    (base / "more" / "code.jsonl").write_text(json.dumps({"text": CODE[:400]}) + "\n")
    data = {
        "train": [str(base / "train"), {"uri": str(base / "code"), "domain": "code"}],
        "validation": [str(base / "held-out.jsonl"), str(base / "more" / "code.jsonl")],
    }
    spec = prepare(base, data=data, training=TRAINING, loss={"dynamic_scaling": False})
    spec["teachers"] = [{**teacher, "lead": 0.0} for teacher in spec["teachers"]]
    return spec


@pytest.fixture(scope="module")
def taught(base, values):
    """A student of cross-entropy, after half of the steps; its summary, and its bits per byte by domain."""
    summary = run(changed(values, training={"max_steps": 6}), base, base / "taught", baseline=True)
    return summary, validations(base / "taught")[-1]


def validations(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation_bits_per_byte" in line]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_teacher_is_heard_until_the_student_has_passed_it(base, values, taught, tmp_path, packing):
    """It is the student itself, some steps on: of its vocabulary, and measured at what its own training has told."""
    known, (summary, told) = values["teachers"][1] | {"model": str(base / "taught" / "last")}, taught
    given = values | {"teachers": [known], "data": values["data"] | {"packing": packing}}
    run(given, base, tmp_path)
    found = validations(tmp_path)
    assert [line["step"] for line in found] == [0, 3, 6, 9, 12]
    for line in found:
        student = {"": line["validation_bits_per_byte"], "code": line["validation_domains"]["code"]}
        teacher = {"": summary.last_validation_bits_per_byte, "code": told["validation_domains"]["code"]}
        assert set(line.get("silent", {}).get("same", [])) == {domain for domain in teacher if student[domain] < teacher[domain]}
    assert "silent" not in found[0] and sorted(found[-1]["silent"]["same"]) == ["", "code"]
    assert [line["teachers"]["same"]["kd"] > 0 for line in steps(tmp_path)][:3] == [True] * 3
    assert steps(tmp_path)[-1]["teachers"]["same"]["kd"] == 0
    [caution] = [
        c for c in cautions(Run.collect(DistillationSpec.model_validate(given), tmp_path)) if "no longer heard" in c.title
    ]
    assert "same" in caution.title and "on code from step" in caution.detail


@pytest.mark.slow
def test_what_no_teacher_is_ahead_on_is_learned_from_the_text(base, values, tmp_path):
    """A sample that nobody teaches has as much more of CE; of two teachers the one that is ahead is heard alone."""
    behind, ahead = dict.fromkeys(("", "code"), 99.0), dict.fromkeys(("", "code"), 0.1)
    with mock.patch.object(heard, "bits_of_teachers", lambda *_: {"other": behind, "same": behind}):
        run(values, base, tmp_path / "none")
    loss = DistillationSpec.model_validate(values).loss
    for line in steps(tmp_path / "none"):
        share = loss.ce_weight + loss.kd_weight * (1 - (line["step"] - 1) / TRAINING["max_steps"])
        assert line["kd"] == 0 and line["loss"] == pytest.approx(share * line["ce"], rel=1e-6)
    with mock.patch.object(heard, "bits_of_teachers", lambda *_: {"other": ahead, "same": behind}):
        run(values, base, tmp_path / "one")
    assert all(line["teachers"]["other"]["kd"] > 0 and line["teachers"]["same"]["kd"] == 0 for line in steps(tmp_path / "one"))
    assert {name for line in validations(tmp_path / "one") for name in line["silent"]} == {"same"}


@pytest.mark.slow
def test_a_teacher_that_cannot_be_measured_is_heard(base, values, tmp_path):
    """If its outputs are not finite, the step that hears it says so, by its name (`tests/faults/test_nonfinite.py`)."""
    with mock.patch.object(heard, "_nats_and_bytes", lambda *_: torch.tensor([torch.inf, 1.0])):
        run(changed(values, training={"max_steps": 1}), base, tmp_path)
    [line] = steps(tmp_path)
    assert [name for name, teacher in line["teachers"].items() if teacher["kd"] > 0] == ["other", "same"]


@pytest.mark.slow
def test_what_a_teacher_is_measured_at(base, values):
    """By domain, of the rows it teaches, over the shares of all ranks; as its own model has them."""
    values = values | {"teachers": [values["teachers"][0], values["teachers"][1] | {"domains": ["code"]}]}
    spec = DistillationSpec.model_validate(values)
    inputs = TrainingInputs((base / "rows",), {"other": "p_kl"}, {"other": base / "w.safetensors"})
    ready = ready_teachers(
        spec,
        inputs,
        Loaded.of(load_model(spec.student.model), load_tokenizer(spec.student.model), "student"),
        torch.device("cpu"),
    )
    rows, collate = load_rows(base / "rows" / "validation"), Collator.for_rows(spec, base / "rows" / "train")
    sums = {}
    with TeacherPool([teacher.setup for teacher in ready]) as pool:
        for ranks in (1, 2):
            parts = []
            for rank in range(ranks):
                args = SimpleNamespace(per_device_train_batch_size=2, process_index=rank, world_size=ranks)
                held_out = HeldOut.of(rows, {"", "code"}, collate, args)
                with mock.patch.object(heard, "over_ranks", lambda sums, _, parts=parts: parts.append(sums) or sums):
                    heard.bits_of_teachers(Teaching(ready, pool), held_out, 3, torch.device("cpu"))
            sums[ranks] = sum(parts)
    torch.testing.assert_close(sums[1], sums[2])
    model = load_model(values["teachers"][0]["model"])
    for group, domain in enumerate(held_out.groups):
        nats = size = 0.0
        for row in (rows[i] for i in range(len(rows)) if (rows[i]["domain"] == "code") == (domain == "code")):
            with torch.no_grad():
                logits = model(torch.tensor(row["teacher_other_ids"])[None].long()).logits[0].log_softmax(-1)
            for place in range(1, len(row["teacher_other_ids"])):
                if row["teacher_other_mask"][place] and row["teacher_other_bytes"][place]:
                    nats -= float(logits[place - 1, row["teacher_other_ids"][place]])
                    size += row["teacher_other_bytes"][place]
        torch.testing.assert_close(sums[1][0, group], torch.tensor([nats, size], dtype=torch.float64), rtol=1e-5, atol=0)
    assert sums[1][1, list(held_out.groups).index("")].tolist() == [0, 0]


@pytest.mark.slow
def test_scores_tell_what_their_teacher_is_measured_at(base, values, tmp_path):
    """The same as the running teacher, unless they were made beside other validation rows."""
    values = values | {"loss": values["loss"] | {"mode": "partition_kl"}}
    values["teachers"] = [values["teachers"][0], values["teachers"][1] | {"domains": ["code"]}]
    scored = DistillationSpec.model_validate(values | {"teachers": [t | {"scores": {"top_k": 8}} for t in values["teachers"]]})
    for teacher in ("other", "same"):
        score_teacher(scored, teacher, base / "rows", tmp_path / teacher)
    rows, collate = load_rows(base / "rows" / "validation"), Collator.for_rows(scored, base / "rows" / "train")
    args = SimpleNamespace(per_device_train_batch_size=2, process_index=0, world_size=1)
    held_out, found = HeldOut.of(rows, {"", "code"}, collate, args), []
    for spec in (DistillationSpec.model_validate(values), scored):
        folders = {teacher: (tmp_path / teacher,) for teacher in ("other", "same")}
        inputs = TrainingInputs((base / "rows",), {"other": "partition_kl"}, {"other": base / "w.safetensors"}, folders)
        student = Loaded.of(load_model(spec.student.model), load_tokenizer(spec.student.model), "student")
        ready, read = ready_teachers(spec, inputs, student, torch.device("cpu")), scored_teachers(spec, inputs)
        ready = with_measurements(ready, read, rows)
        setups = [teacher.setup for teacher in ready if teacher.setup is not None]
        with TeacherPool(setups) if setups else nullcontext() as pool:
            found.append(heard.bits_of_teachers(Teaching(ready, pool), held_out, 3, torch.device("cpu")))
    assert found[0].keys() == found[1].keys() == {"other", "same"} and found[0]["same"].keys() == {"code"}
    for teacher, bits in found[0].items():
        assert found[1][teacher] == pytest.approx(bits, rel=1e-5)
    others = with_measurements(ready, read, rows.select([0]))
    assert heard.bits_of_teachers(Teaching(others), held_out, 3, torch.device("cpu")) == {}


def test_a_run_that_goes_on_keeps_what_was_decided():
    """Between two validations; at one it decides anew, by what teachers have been measured at before."""
    args, teaching = SimpleNamespace(eval_steps=4), Teaching((ReadyTeacher("a", None, "", lead=0.1),))
    progress = Progress(teacher_bits={"a": {"": 1.0, "code": 2.0}}, silent={"a": ["code"]})
    assert heard.hear(teaching, progress, {"": 0.9, "code": 2.1}, None, 6, args) == []
    assert teaching.silent == progress.silent == {"a": ["code"]}
    told = heard.hear(teaching, progress, {"": 1.1, "code": 2.5}, None, 8, args)
    assert teaching.silent == progress.silent == {"a": [""]}
    assert told == [
        "teacher a is 9.1 % ahead of the student (1.0000 bits per byte): not heard",
        "teacher a is 20.0 % ahead of the student on code (2.0000 bits per byte): heard again",
    ]
    assert heard.hear(teaching, progress, {"": 1.2, "code": 1.9}, None, 12, args) == [
        "teacher a is 16.7 % ahead of the student (1.0000 bits per byte): heard again",
        "teacher a is 5.3 % behind the student on code (2.0000 bits per byte): not heard",
    ]


def test_a_batch_without_a_teacher_on_some_domains(base, values):
    spec = DistillationSpec.model_validate(
        values | {"teachers": [values["teachers"][0] | {"domains": ["code"]}, values["teachers"][1]]}
    )
    rows = load_rows(base / "rows" / "train")
    code = [rows[i] for i in range(len(rows)) if rows[i]["domain"] == "code"][:2]
    text = [rows[i] for i in range(len(rows)) if rows[i]["domain"] != "code"][:2]
    batch = Collator.for_rows(spec, base / "rows" / "train")([code[0], text[0], code[1], text[1]])
    assert batch.domains == ("code", "", "code", "")
    assert batch.unheard(1, ["code"]).taught[1].tolist() == [False, True, False, True]
    assert batch.unheard(1, ["code"]).teachers[1] is batch.teachers[1]  # it is asked for what it still teaches
    assert batch.unheard(0, [""]).taught[0].tolist() == batch.taught[0].tolist()
    silent = batch.unheard(0, ["code"])
    assert silent.taught[0].tolist() == [False] * 4 and silent.teachers[0].model_inputs()["input_ids"].numel() == 1
    assert silent.teachers[0].unpacked(torch.zeros(1, 1, 7)).shape == (*batch.teachers[0].input_ids.shape, 7)
    assert replace(silent, taught=batch.taught, teachers=batch.teachers) == batch


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"loss": {"weight_metric": "ce"}}, "lead: serves aggregation: sum with fixed weights only"),
        ({"data": {"train": ["a.txt"]}}, "lead: needs data.validation"),
        (
            {"teachers": [{"id": "b", "model": "b", "transport": "topk", "top_k": 8, "lead": 0.2}]},
            "lead: needs what transport: topk",
        ),
    ],
    ids=["weight_metric", "validation", "topk"],
)
def test_a_lead_that_nobody_could_keep_is_refused(changes, line):
    given = {
        "name": "run",
        "student": {"model": "a"},
        "teachers": [{"id": "b", "model": "b", "lead": 0.2}],
        "data": {"train": ["a.txt"], "validation": ["b.txt"]},
        "output": {"uri": "out"},
    }
    DistillationSpec.from_text(json.dumps(given))
    with pytest.raises(InputError, match=f"teachers.*{line}"):
        DistillationSpec.from_text(json.dumps(given | changes))
