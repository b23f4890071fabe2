"""The paper's benchmarks end to end: the harness's own task files, a stand-in for the hub, the table of the report."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.support.hub_server import Hub
from tests.support.paper_suite import MATH, paper_data
from tests.support.tiny import tiny_model
from xtoken_core.evaluation import harness as benchmarks
from xtoken_core.evaluation.bits_per_byte import opener_of
from xtoken_core.evaluation.evaluate import _as_it_lies, evaluate
from xtoken_core.evaluation.intervals import difference_interval, share_interval
from xtoken_core.report.page import render_report
from xtoken_core.report.run import Run
from xtoken_core.report.tables import tasks_table
from xtoken_core.report.verdict import score_difference, task_difference, verdict
from xtoken_core.results.evaluation import Evaluation, TaskScore
from xtoken_core.results.subject import BEFORE, LAST, TWIN_LAST, teacher_subject
from xtoken_core.spec import DistillationSpec
from xtoken_core.tokenization import load_tokenizer, row_bos

pytestmark = pytest.mark.slow

lm_eval = pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[2]
METRICS = {
    "gsm8k": "exact_match,flexible-extract",
    "mmlu": "acc,none",
    "hendrycks_math": "exact_match,none",
    "winogrande": "acc,none",
    "hellaswag": "acc_norm,none",
}
SPEC = {
    "name": "benchmarked",
    "student": {"model": "org/small"},
    "teachers": [{"id": "t", "model": "org/big"}, {"id": "u", "model": "org/other", "tokenizer": "org/its"}],
    "data": {"train": ["unused"]},
    "output": {"uri": "unused"},
}
DOCUMENTS = {"gsm8k": 2, "mmlu": 2 * 57, "hendrycks_math": 2 * len(MATH), "winogrande": 2, "hellaswag": 2}


def with_hub(arguments: list[str], folder: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python module against a hub, with empty caches in `folder`."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "student", 400)


@pytest.fixture(scope="module")
def told(model):
    """What the suite tells of the tiny model and of one that knows."""
    tasks = (Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml")
    subjects = [yaml.load(path.read_text(), yaml.BaseLoader)["dataset_name"] for path in tasks]
    absent = SPEC | {"student": {"model": str(model)}, "evaluation": {"bits_per_byte": False}}
    (model / "absent.yaml").write_text(yaml.safe_dump(absent))
    with Hub(paper_data(subjects)) as hub:
        arguments = [str(model / "told.json"), str(model), str(model / "absent.yaml")]
        done = with_hub(["tests.support.paper_suite", *arguments], model, hub.endpoint)
        assert done.returncode == 0, done.stderr
    return json.loads((model / "told.json").read_text())


def test_the_five_have_their_metrics_documents_and_shots(told):
    for name in ("model", "oracle"):
        tasks = told[name]["tasks"]
        assert {task: entry["metric"] for task, entry in tasks.items()} == METRICS
        assert {task: entry["samples"] for task, entry in tasks.items()} == DOCUMENTS
        assert all(entry["shots"] == 3 and entry["stderr"] is not None for entry in tasks.values())
        assert all(0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1 for entry in tasks.values())
        assert all(entry["high"] - entry["low"] > 0.01 for entry in tasks.values())  # also where all answers are right


def test_right_answers_are_seen_to_be_right(told):
    """Every filter that takes an answer out of a text, and every choice."""
    assert all(entry["value"] == 1 for entry in told["oracle"]["tasks"].values())
    assert told["oracle"]["tasks"]["gsm8k"]["metrics"] == {"exact_match,strict-match": 1, "exact_match,flexible-extract": 1}
    assert told["model"]["tasks"]["gsm8k"]["value"] == told["model"]["tasks"]["hendrycks_math"]["value"] == 0


def test_groups_are_those_of_their_parts(told):
    mmlu = told["model"]["tasks"]["mmlu"]
    assert set(mmlu["parts"]) == {"mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"}
    assert sum(part["samples"] for part in mmlu["parts"].values()) == mmlu["samples"]
    mean = sum(part["value"] * part["samples"] for part in mmlu["parts"].values()) / mmlu["samples"]
    assert mmlu["value"] == pytest.approx(mean)
    assert len(told["model"]["tasks"]["hendrycks_math"]["parts"]) == len(MATH)
    assert told["model"]["tasks"]["gsm8k"]["parts"] == {}


def test_three_examples_are_in_every_prompt(told):
    prompts = told["model"]["prompts"]
    assert sorted(set(prompts)) == sorted(set(told["oracle"]["prompts"]))
    marks = {"Question:": "Question: Ann", "Problem:": "Problem: What", "The following are": "\nA. ", "Baking": "A cook takes"}
    for start, mark in marks.items():
        chosen = [prompt for prompt in prompts if prompt.startswith(start)]
        assert chosen and {prompt.count(mark) for prompt in chosen} == {4}
    winogrande = [prompt for prompt in prompts if prompt.startswith("The ") and "cups" in prompt]
    assert winogrande and {prompt.count("did not fit") for prompt in winogrande} == {4}


def test_differences_and_the_noise(told):
    before, after = (
        Evaluation.model_validate({"subject": who, "tasks": told[name]["tasks"]})
        for who, name in ((BEFORE, "model"), (LAST, "oracle"))
    )
    found = {task: task_difference(task, after, before) for task in METRICS}
    assert found["mmlu"].tone == "good" and found["mmlu"].value == 1 - before.tasks["mmlu"].value
    assert task_difference("mmlu", before, before).tone == "even"
    for entry in before.tasks.values():
        assert len(entry.scores) == entry.samples
        assert entry.scores.count("1") == round(entry.value * entry.samples)
    assert all(difference.paired for difference in found.values())


def test_paired_differences_hold_their_level_and_are_narrower():
    """Two models of equal worth that mostly agree: 95 of 100 intervals hold zero, and they know that the questions are the same."""
    random, held, narrower = np.random.default_rng(0), 0, 0
    for _ in range(400):
        hard = random.random(200)
        entries = []
        for _ in "ab":
            right = (hard + random.normal(0, 0.1, 200)) < 0.4
            low, high = share_interval(right.mean(), 200)
            scores = "".join(str(int(r)) for r in right)
            entries.append(TaskScore(value=right.mean(), low=low, high=high, questions="q", scores=scores))
        paired, alone = (
            score_difference(LAST, BEFORE, *entries),
            score_difference(LAST, BEFORE, entries[0], entries[1].model_copy(update={"questions": "r"})),
        )
        held += not paired.exceeds_noise
        narrower += paired.high - paired.low < 0.7 * (alone.high - alone.low)
    assert 0.92 <= held / 400 <= 0.98 and narrower == 400


def test_the_offline_suite_in_a_report(model, tmp_path):
    """Everybody is evaluated as a run does it; the table has them side by side, with the noise."""
    teacher = tiny_model(tmp_path / "teacher", 400, seed=1)
    sections = {
        "student": {"model": str(model)},
        "teachers": [{"id": "t", "model": str(teacher)}],
        "evaluation": {"bits_per_byte": False, "tasks": ["xtoken-offline"], "limit": 8, "ce_baseline": True},
    }
    spec = DistillationSpec.from_text(json.dumps(SPEC | sections))
    trained = {LAST: teacher, TWIN_LAST: model}  # as if the student had become its teacher, and the twin nothing
    everybody = (BEFORE, *trained, teacher_subject("t"))
    run = Run.collect(spec, results=[evaluate(spec, subject, trained.get(subject)) for subject in everybody])
    table = tasks_table(run)
    assert table.columns == ["benchmark", "student before", "student after, last", "change", "CE twin, last", "teacher t"]
    assert [row[0].note for row in table.rows] == ["acc, 3-shot, n = 8", "acc norm, 0-shot, n = 8"]
    for _, before, after, change, twin, taught in table.rows:
        assert (after.sort, twin.sort) == (taught.sort, before.sort) and 0 <= before.sort <= 1
        assert change.sort == pytest.approx(after.sort - before.sort)
        assert change.tone == "even" and change.note.endswith("within the noise")  # of eight questions
    assert verdict(run).sentences == ["Of 2 benchmarks 0 improved beyond the noise, 0 got worse, 2 cannot be told apart."]
    assert "xtoken_gsm_symbolic" in render_report(run)


def test_data_that_the_hub_does_not_have_is_one_line(told):
    code, line = told["refused"]
    assert code == 2, line
    assert line.strip().splitlines()[-1].startswith("evaluation.tasks: arc_easy: Dataset 'allenai/ai2_arc' doesn't exist")


def test_a_task_that_nobody_knows_is_one_line(told):
    code, line = told["unknown"]
    assert code == 2 and line.strip().splitlines()[-1].startswith("evaluation.tasks: nonesuch: no task")


def test_intervals_of_shares():
    """Against published figures: 81 of 263 and 56/70 - 48/80 (Newcombe, 1998)."""
    assert share_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert share_interval(0.0, 10)[0] == 0 and share_interval(0.0, 10)[1] == pytest.approx(0.2775, abs=5e-5)
    a, b = ((right / count, *share_interval(right / count, count)) for right, count in ((56, 70), (48, 80)))
    assert difference_interval(a, b) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_what_vllm_is_given(model, monkeypatch):
    """The harness's own adapter takes our arguments and hands them on; its engine alone is replaced, for it needs a GPU."""
    engine = {}
    names = ("vllm", "vllm.lora", "vllm.lora.request", "vllm.renderers", "vllm.renderers.hf", "vllm.tokenizers")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vllm"].__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    llm = type(
        "LLM", (), {"__init__": lambda self, **given: engine.update(given), "llm_engine": types.SimpleNamespace(model_config=0)}
    )
    vars(sys.modules["vllm"]).update(LLM=llm, SamplingParams=None, TokensPrompt=None)
    sys.modules["vllm.lora.request"].LoRARequest = None
    sys.modules["vllm.renderers.hf"].resolve_chat_template = lambda **given: None
    sys.modules["vllm.tokenizers"].get_tokenizer = lambda name, tokenizer_mode, trust_remote_code, revision, **given: (
        load_tokenizer(name)
    )
    monkeypatch.delitem(sys.modules, "lm_eval.models.vllm_causallms", raising=False)
    plain = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0" if name == "vllm" else plain(name))
    monkeypatch.setattr(benchmarks.torch.cuda, "is_available", lambda: True)
    tok = load_tokenizer(str(model))
    lm = benchmarks._language_model(AutoModelForCausalLM.from_pretrained(model), tok, model)
    monkeypatch.delitem(sys.modules, "lm_eval.models.vllm_causallms", raising=False)
    assert type(lm).__name__ == "VLLM" and lm.batch_size == "auto"
    assert (engine["model"], engine["dtype"], engine["gpu_memory_utilization"]) == (str(model), "bfloat16", 0.8)
    assert engine.keys() >= {"tokenizer", "max_model_len", "tensor_parallel_size", "seed"}
    assert lm.prefix_token_id == opener_of(tok) and lm.add_bos_token is (row_bos(tok) is not None)


def test_a_changed_model_is_not_left_to_others_to_load():
    spec = DistillationSpec.from_text(json.dumps(SPEC | {"student": {"model": "org/small", "keep_layers": [0]}}))
    t, u = map(teacher_subject, ("t", "u"))
    assert not _as_it_lies(spec, BEFORE, "org/small") and _as_it_lies(spec, LAST, "out/last")
    assert _as_it_lies(spec, t, "org/big") and not _as_it_lies(spec, t, "s3://models/big")
    assert not _as_it_lies(spec, u, "org/other")  # with a tokenizer from elsewhere
