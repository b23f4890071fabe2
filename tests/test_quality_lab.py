"""The lab on toy models: every kind of arm trains, what has a result is left out, and the report holds all of it."""

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks.quality import joined, lead, shares
from tests.benchmarks.quality.arms import Arm
from tests.benchmarks.quality.prepare import prepare_folder
from tests.benchmarks.quality.report import write_report
from tests.benchmarks.quality.teachers import CachedTeacher, feed
from tests.benchmarks.quality.text import collect, mixed
from tests.benchmarks.quality.train import ratio_at
from tests.benchmarks.quality.work import run
from tests.support.tiny import texts, tiny_model
from xtoken_core.evaluation.harness import OFFLINE_TASKS
from xtoken_core.losses import HiddenLogits
from xtoken_core.models import load_model
from xtoken_core.projection import Projection, make_projection
from xtoken_core.spec import DistillationSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy student and teacher with rows, W and cells."""
    folder = tmp_path_factory.mktemp("lab")
    tiny_model(folder / "student", 400)
    tiny_model(folder / "teacher", 500, seed=1)
    (folder / "text").mkdir()
    for name, some in {"train.code": texts(6)[:2], "train.prose": texts(6)[2:4], "code": texts(6)[4:]}.items():
        (folder / "text" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text[:1500]}) + "\n" for text in some))
    tiny_model(folder / "other", 450, seed=2)
    (folder / "tasks").mkdir()
    for name in ("humaneval_choice.jsonl", "humaneval_choice.yaml"):
        lines = (OFFLINE_TASKS / name).read_text().splitlines(keepends=True)
        (folder / "tasks" / name).write_text("".join(lines[:3] if name.endswith(".jsonl") else lines))
    prepare_folder(
        str(folder / "student"), [str(folder / name) for name in ("teacher", "other")], folder / "text", folder / "data", 64
    )
    return folder


def plan(folder: Path) -> dict:
    """Every kind of arm, for two steps."""
    loss = {"mode": "partition_kl"}
    names = ("teacher", "other")
    teachers = [
        {"model": str(folder / name), "projection": str(folder / "data" / f"w-{i}.safetensors")} for i, name in enumerate(names)
    ]
    common = {"data": str(folder / "data"), "held_out": ["code"], "rows": 8, "batch": 4}
    asked = {"tasks": [str(folder / "tasks")]}
    settings = [
        {"name": "cross", "student": str(folder / "student"), "teachers": [*teachers, teachers[0] | {"columns": 0}, teachers[0] | {"columns": 0, "precision": "fp8"}], **common},
        {"name": "same", "student": str(folder / "teacher"), "teachers": [{"model": teachers[0]["model"]}], "as_teacher": True, "keep_layers": 1, **common, **asked},
    ]  # fmt: skip
    one = {"loss": loss, "teachers": [0]}
    arms = [
        {"name": "ce"},
        {"name": "partition", "ratio": [1.0, 0.0], **one},
        {"name": "first", "variant": "first_row", **one},
        {"name": "joined", "variant": "joined", **one},
        {"name": "few", "cells": 4, **one},
        {"name": "p_kl", "loss": {"mode": "p_kl", "vocab_topk": 64}, "teachers": [0]},
        {"name": "two", "loss": loss, "teachers": [0, 1], "domains": [0, 1]},
        {"name": "silent", "loss": loss, "teachers": [0], "domains": [0, None], "until": [99.0, 99.0]},
        {"name": "everywhere", "loss": loss, "teachers": [0, 1]},
        {"name": "again", "loss": loss, "teachers": [2]},
        {"name": "fp8", "loss": loss, "teachers": [3]},
    ]
    jobs = [{"setting": "cross", "arm": arm, "steps": 2} for arm in arms]
    jobs += [{"setting": "same", "arm": arm, "steps": 2} for arm in (arms[0], {"name": "kl", "loss": {}})]
    settings.append(settings[0] | {"name": "scarce", "rows": 4})
    jobs.append({"setting": "scarce", "arm": arms[0], "steps": 2})
    return {"settings": settings, "jobs": [*jobs, jobs[0] | {"batch": 2, "seed": 1, "save": str(folder / "trained")}]}


def test_every_arm_trains_once(folder: Path) -> None:
    (folder / "plan.json").write_text(json.dumps(plan(folder)))
    for _ in range(2):
        run(folder / "plan.json", folder / "out", ["cpu"], 600)
    lines = [json.loads(line) for file in (folder / "out").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert [line.get("failed") for line in lines] == [None] * 15
    assert all(0 < line["held_out"]["code"] < 20 and [step for step, _ in line["curve"]] == [0, 1, 2] for line in lines)
    assert len({line["curve"][0][1] for line in lines}) == 2  # every arm starts from its setting's weights
    assert load_model(str(folder / "trained")).lm_head.weight.isfinite().all()
    write_report(folder / "out", folder / "report")
    table = (folder / "report.md").read_text()
    assert all(f"| {job['arm']['name']} | 2 |" in table for job in plan(folder)["jobs"])
    assert (
        all(f"### {setting}" in table for setting in ("cross", "same", "scarce"))
        and "<svg" in (folder / "report.svg").read_text()
    )
    assert [set(line["tasks"]) for line in lines if line["tasks"]] == [
        {"xtoken_humaneval_choice"}
    ] * 2 and "xtoken_humaneval_choice" in table
    kd = {line["key"].split("-")[1]: line["losses"][0].get("kl_loss") for line in lines}
    assert kd["partition"] > kd["first"] > 0 and len({kd[name] for name in ("partition", "joined", "few")}) == 3
    assert kd["partition"] > kd["few"] and kd["partition"] == kd["again"]
    assert kd["silent"] == 0 and kd["everywhere"] > kd["partition"] and kd["two"] != kd["everywhere"]


def test_a_teacher_of_one_domain(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heard as one, it does not turn the mixture into one of its domain: KD and more of CE have the same share of every row."""
    for name, value in {"STEPS": 2, "BATCH": 4, "HELD_OUT": 2}.items():
        monkeypatch.setattr(shares, name, value)
    paths = [folder / "student", folder / "teacher", folder / "data", tmp_path / "out.jsonl"]
    monkeypatch.setattr("sys.argv", ["shares", *map(str, paths)])
    shares.main()
    lines = [json.loads(line) for line in paths[-1].read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["ce", "masked", "taught"]
    assert len({line["end"]["code"] for line in lines}) == 3 and all(0 < line["halfway"]["code"] < 20 for line in lines)


def test_a_teacher_that_is_too_little_ahead(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 2, "BATCH": 4, "HELD_OUT": 2}.items():
        monkeypatch.setattr(shares, name, value)
    monkeypatch.setattr(lead, "other_bits", lambda *_: 99.0)
    paths = [folder / "student", folder / "teacher", folder / "other", folder / "data", tmp_path / "out.jsonl"]
    monkeypatch.setattr("sys.argv", ["lead", *map(str, paths)])
    lead.main()
    both, _, one = [json.loads(line) for line in paths[-1].read_text().splitlines()]
    assert both["asked"] == one["asked"] and 0 < both["asked"]["0"] < 20
    assert both["end"]["code"] != one["end"]["code"]


def test_joined_cells_serve_a_run_as_its_stored_w(folder: Path) -> None:
    values = {
        "name": "joined",
        "student": {"model": str(folder / "student")},
        "teachers": [{"id": "t", "model": str(folder / "teacher"), "projection": {"uri": str(folder / "data" / "joined-0.safetensors")}}],
        "data": {"train": [str(folder / "text" / "code.jsonl")]},
        "training": {"max_steps": 1},
        "output": {"uri": str(folder)},
    }  # fmt: skip
    w = make_projection(DistillationSpec.model_validate(values), "t").projection
    built = Projection.load(folder / "data" / "w-0.safetensors")
    assert w.cells is not None and built.cells is not None
    assert w.cells.num_cells < built.cells.num_cells and torch.equal(w.indices, built.indices)
    together = {(a, b) for a, b in zip(built.cells.student.tolist(), w.cells.student.tolist())}
    assert len(together) == len({a for a, _ in together})  # a cell goes into one cell, whole


def test_how_much_text_it_takes_to_join_cells(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(joined, "ROWS", (8,))
    monkeypatch.setattr("sys.argv", ["joined", str(folder / "data"), "--teacher", "0"])
    joined.main()
    alone, *lines = map(json.loads, capsys.readouterr().out.splitlines())
    whole = [line for line in lines if "borne_out" not in line]
    assert len(lines) == 2 * len(whole) and {line["rows"] for line in lines} == {8, whole[0]["rows"]}
    assert alone["cells"] > whole[0]["cells"] and alone["apart"]["code"] >= whole[0]["apart"]["code"]
    pairs = [line["pairs"] for line in whole]
    assert pairs == sorted(pairs, reverse=True) and all(line["apart_own"] <= 0.05 for line in whole)


def test_work_of_a_process_that_ended_is_done_again(folder: Path) -> None:
    (folder / "plan.json").write_text(json.dumps(plan(folder) | {"jobs": plan(folder)["jobs"][:1]}))
    (folder / "again").mkdir()
    (folder / "again" / "cross-ce-0-2.claim").write_text(str(2**22 + 1))  # above the largest process id
    run(folder / "plan.json", folder / "again", ["cpu"], 600)
    assert len(list((folder / "again").glob("*.jsonl"))) == 1


def test_a_course_goes_through_its_points() -> None:
    arm = Arm("one", ratio=(2.0, 1.0, 0.0))
    assert [ratio_at(arm, step, 5) for step in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]


def test_a_teacher_is_read_in_the_order_of_its_rows() -> None:
    head = HiddenLogits(torch.empty(0), torch.zeros(3, 2))
    teacher = CachedTeacher(0, 0, torch.arange(8.0).view(4, 1, 2), 4, head, None, None, 0.0)
    steps = list(feed({0: teacher}, torch.tensor([3, 0, 2, 1]).split(2), torch.device("cpu")))
    assert [hidden[0][:, 0, 0].tolist() for _, hidden in steps] == [[6.0, 0.0], [4.0, 2.0]]


def test_text_keeps_some_packages_out_of_training(tmp_path: Path) -> None:
    for package in ("networkx", "other"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "code.py").write_text(f"# {package}\n" * 300)
    (tmp_path / "other" / "tests").mkdir()
    (tmp_path / "other" / "tests" / "code.py").write_text("# test\n" * 300)
    found = collect(tmp_path, None, 1, 5)
    assert found["english"] == [] and len(found["train"]) == len(found["code"]) == 1
    assert "# other" in found["train"][0] and "# networkx" in found["code"][0]


def test_mixed_text_is_half_code_and_half_english(tmp_path: Path) -> None:
    (tmp_path / "factbook").mkdir()
    (tmp_path / "factbook" / "aa.json").write_text(
        json.dumps({"Introduction": {"text": "A country of many rivers and hills. " * 300}})
    )
    (tmp_path / "brown").mkdir()
    (tmp_path / "brown" / "ca01").write_text("The/at jury/nn said/vbd ``/`` so/rb ''/'' ,/, Friday/nr ./. " * 300)
    code = {"train": ["x = 1  # a line\n" * 100] * 30, "code": ["y = 2\n" * 400], "english": []}
    found = mixed(code, tmp_path / "factbook", tmp_path / "brown", 1)
    sizes = {name: sum(map(len, texts)) for name, texts in found.items()}
    assert len(found["english"]) == 1 and 0 <= sizes["train.code"] - sizes["train.english"] < 1600
    assert any('The jury said "so", Friday.' in text for text in found["train.english"] + found["english"])
