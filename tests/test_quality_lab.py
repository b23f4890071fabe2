"""The lab on toy models: every kind of arm trains, what has a result is left out, and the report holds all of it."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.quality.prepare import prepare_folder
from tests.benchmarks.quality.report import write_report
from tests.benchmarks.quality.text import collect
from tests.benchmarks.quality.work import run
from tests.support.tiny import texts, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy student and teacher with rows, W and cells."""
    folder = tmp_path_factory.mktemp("lab")
    tiny_model(folder / "student", 400)
    tiny_model(folder / "teacher", 500, seed=1)
    (folder / "text").mkdir()
    for name, some in {"train": texts(6)[:4], "code": texts(6)[4:]}.items():
        (folder / "text" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text[:1500]}) + "\n" for text in some))
    prepare_folder(str(folder / "student"), [str(folder / "teacher")], folder / "text", folder / "data", 64)
    return folder


def plan(folder: Path) -> dict:
    """Every kind of arm, for two steps."""
    loss = {"mode": "partition_kl"}
    teacher = {"model": str(folder / "teacher"), "projection": str(folder / "data" / "w-0.safetensors")}
    common = {"data": str(folder / "data"), "held_out": ["code"], "rows": 8, "batch": 4}
    settings = [
        {"name": "cross", "student": str(folder / "student"), "teachers": [teacher], **common},
        {"name": "same", "student": str(folder / "teacher"), "teachers": [{"model": teacher["model"]}], "as_teacher": True, "keep_layers": 1, **common},
    ]  # fmt: skip
    arms = [
        {"name": "ce"},
        {"name": "partition", "loss": loss, "ratio": [1.0, 0.0]},
        {"name": "first", "loss": loss, "variant": "first_row"},
        {"name": "reached", "loss": {"mode": "p_kl", "vocab_topk": 64}, "variant": "reached"},
    ]
    jobs = [{"setting": "cross", "arm": arm, "steps": 2} for arm in arms]
    jobs += [{"setting": "same", "arm": arm, "steps": 2} for arm in (arms[0], {"name": "kl", "loss": {}})]
    return {"settings": settings, "jobs": jobs}


def test_every_arm_trains_once(folder: Path) -> None:
    (folder / "plan.json").write_text(json.dumps(plan(folder)))
    for _ in range(2):
        run(folder / "plan.json", folder / "out", ["cpu"], 600)
    lines = [json.loads(line) for line in (folder / "out" / "cpu.jsonl").read_text().splitlines()]
    assert [line.get("failed") for line in lines] == [None] * 6
    assert all(0 < line["held_out"]["code"] < 20 for line in lines)
    write_report(folder / "out", folder / "report")
    table = (folder / "report.md").read_text()
    assert all(f"| {arm} | 2 |" in table for arm in ("ce", "partition", "first", "reached", "kl")) and "### same" in table
    assert "<svg" in (folder / "report.svg").read_text()
    kd = {line["key"]: line["curve"][0]["kl_loss"] for line in lines}
    assert kd["cross-partition-0-2"] > kd["cross-first-0-2"] > 0


def test_text_keeps_some_packages_out_of_training(tmp_path: Path) -> None:
    for package in ("networkx", "other"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "code.py").write_text(f"# {package}\n" * 300)
    (tmp_path / "other" / "tests").mkdir()
    (tmp_path / "other" / "tests" / "code.py").write_text("# test\n" * 300)
    found = collect(tmp_path, None, 1, 5)
    assert found["english"] == [] and len(found["train"]) == len(found["code"]) == 1
    assert "# other" in found["train"][0] and "# networkx" in found["code"][0]
