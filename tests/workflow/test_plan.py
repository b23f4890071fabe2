"""The plan of a run: its arithmetic, and that it goes by a finished run's speed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from pipelines.__main__ import cli
from pipelines.compiling import compile_spec, documents
from tests.support.architectures import tiny_config
from tests.support.tiny import tiny_tokenizer
from tests.support.training_run import prepare, run
from xtoken_core.costs import ModelSize, host_bytes, step_seconds
from xtoken_core.data.statistics import statistics_of
from xtoken_core.errors import InputError
from xtoken_core.report.run import Run
from xtoken_core.results.pilot import Pilot, Trial
from xtoken_core.results.rows import RowStatistics
from xtoken_core.results.training import TrainingSummary
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.plan import plan
from xtoken_core.workflow.plan_speed import model_sizes, step_shape, training_flops
from xtoken_core.workflow.resolve import resolve
from xtoken_core.workflow.rungs import as_candidate, candidates_of


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A run of a student and a teacher with experts, on 6,400 bytes of text."""
    root = tmp_path_factory.mktemp("plan")
    for name, kind in (("student", "llama"), ("teacher", "qwen3_moe")):
        tiny_config(kind, vocab_size=300).save_pretrained(root / name)
        tiny_tokenizer(300).save_pretrained(root / name)
    (root / "text.txt").write_text("x" * 6400)
    values = {
        "name": "planned",
        "student": {"model": str(root / "student")},
        "teachers": [{"id": "t", "model": str(root / "teacher")}],
        "data": {"train": [str(root / "text.txt")], "max_length": 32},
        "training": {"max_steps": 10, "global_batch_size": 20, "save_steps": 5},
        "output": {"uri": str(root / "out")},
    }
    (root / "spec.json").write_text(json.dumps(values))
    return root / "spec.json"


def test_rows_tokens_epochs_and_hours(spec):
    parsed = DistillationSpec.from_yaml(spec)
    found = plan(parsed)
    assert (found.rows_at_least, found.training_tokens_at_most, found.epochs_at_most) == (50, 6400, 4.0)
    assert found.flops == training_flops(parsed, model_sizes(parsed), 6400)
    sizes = model_sizes(parsed)
    seconds = step_seconds(sizes["student.model"], [sizes["teachers.t.model"]], step_shape(parsed, sizes)).total
    assert found.gpu_hours == pytest.approx(10 * seconds / 3600, abs=1e-3) and found.speed.startswith("modelled")
    assert found.disk_bytes["checkpoints"] == 2 * 12 * found.models[0].parameters
    assert found.memory["distill"] > 16 * found.models[0].parameters


def test_memory_of_evaluations_follows_the_models():
    """A student of 1.2, teachers of 4 and 70 billion weights; on a CPU in float32, all of them at a time."""
    student, small, large = (ModelSize(int(n * 1e9), 0, 1, 1, 128_256) for n in (1.2, 4, 70))
    assert (
        16e9 < host_bytes([student, small], gpu=True, row=2048) < 20e9 and 280e9 < host_bytes([large], gpu=True, row=2048) < 290e9
    )
    assert host_bytes([student, small], gpu=True, row=2048) == host_bytes([small], gpu=True, row=2048)
    assert host_bytes([student, small], gpu=False, row=512) > 4 * (1.2e9 + 4e9) + 4 * 4e9
    logits = host_bytes([student, small], gpu=False, row=4096) - host_bytes([student, small], gpu=False, row=1024)
    assert logits == 3072 * 2 * 128_256 * 16  # rows beyond 1,024 tokens get their logits whole


def test_a_gpu_holds_student_and_teacher_for_their_agreement(spec):
    parsed = DistillationSpec.from_yaml(spec)
    student, teacher = (size.parameters for size in model_sizes(parsed).values())
    assert plan(parsed).memory["evaluate"] > 2 * (student + teacher)


@pytest.mark.parametrize(("set_to", "told"), [((), "3Gi"), (("resources.evaluation_memory=20Gi",), "20Gi")])
def test_what_the_spec_names_for_evaluations_wins(spec, set_to, told):
    resolved = resolve(DistillationSpec.from_yaml(spec, set_to).to_json())
    assert (resolved.teacher_memory, resolved.student_memory) == (told, told)


def test_epochs_become_steps_and_an_unknown_corpus_leaves_gaps(spec):
    parsed = DistillationSpec.from_yaml(spec, ["training={epochs: 2, global_batch_size: 20}"])
    assert plan(parsed).steps == 5
    gap = plan(DistillationSpec.from_yaml(spec, ["training={epochs: 2}", "data.train=[/absent.txt]"]))
    assert (gap.steps, gap.rows_at_least, gap.gpu_hours) == (None, None, None)


def test_of_experts_those_count_that_a_token_meets():
    config = tiny_config("qwen3_moe")
    model = AutoModelForCausalLM.from_config(config)
    size = ModelSize.of(model)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    embedding = model.get_input_embeddings().weight.numel()
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.active == size.parameters - experts // 2 - embedding  # 2 of 4 experts; the head is a matrix of its own
    tied = ModelSize.of(AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=True)))
    assert tied.active == tied.parameters


def test_a_finished_run_gives_speed_and_width_of_tokens(spec):
    parsed = DistillationSpec.from_yaml(spec)
    counts = {
        "documents": 1,
        "dropped_documents": {},
        "rows": 9,
        "bytes": 600,
        "student_tokens": 300,
        "corpora": {},
        "teachers": {},
    }
    phases = {"data": 1.0, "teachers": 4.0, "student": 5.0, "save": 100.0}
    summary = TrainingSummary(steps=10, tokens=6400, seconds=120, ranks=1, seconds_by_phase=phases)
    finished = Run.collect(parsed, prepare={"train": RowStatistics(**counts)}).model_copy(update={"summary": summary})
    found = plan(DistillationSpec.from_yaml(spec, ["data.max_rows=1000"]), finished)  # other data than it has counted
    assert found.rows_at_least == 100  # two bytes a token
    assert found.flops / (10 / 3600) == pytest.approx(training_flops(parsed, model_sizes(parsed), 6400) * 3600 / 10)
    assert found.gpu_hours == pytest.approx(10 / 3600, abs=1e-3) and found.speed.endswith("in the run planned")


def test_against_a_run_that_was_run(tmp_path):
    """Before: bounds. By the finished run: its rows, tokens and epochs to the last one; what lies on the disk is not less, and less than a half more."""
    values = prepare(tmp_path, training={"max_steps": 4, "save_steps": 2})
    parsed = DistillationSpec.model_validate(values)
    summary = run(values, tmp_path, tmp_path / "run")
    counted = statistics_of(str(tmp_path / "rows" / "train"))
    finished = Run.collect(parsed, tmp_path / "run", prepare={"train": counted})
    before, after = plan(parsed), plan(parsed, finished)
    assert before.rows_at_least <= counted.rows and before.training_tokens_at_most >= summary.tokens and not before.counted
    assert (after.steps, after.rows_at_least, after.training_tokens_at_most) == (summary.steps, counted.rows, summary.tokens)
    assert after.counted and after.epochs_at_most == round(summary.steps * 2 / counted.rows, 2)
    assert after.flops == training_flops(parsed, model_sizes(parsed), summary.tokens)
    sizes = {
        "rows": (tmp_path / "rows" / "train" / "rows.arrow").stat().st_size,
        "projections": (tmp_path / "w.safetensors").stat().st_size,
        "checkpoints": sum(
            f.stat().st_size for f in (tmp_path / "run" / "checkpoints").rglob("*") if f.suffix in (".safetensors", ".pt")
        ),
        "student": sum(f.stat().st_size for name in ("best", "last") for f in (tmp_path / "run" / name).glob("*.safetensors")),
    }
    for name, size in sizes.items():
        assert 0.7 < after.disk_bytes[name] / size <= 1, name  # headers weigh in files this small
    slow = summary.model_copy(update={"seconds_by_phase": {"data": 0.0, "teachers": 1e5, "student": 2e5}, "seconds": 3e5})
    again = plan(parsed, finished.model_copy(update={"summary": slow}))
    trained = next(task for task in again.tasks if task.task == "distill")
    assert again.gpu_hours == pytest.approx(3e5 / 3600, rel=1e-3) == trained.gpu_hours  # rows that are not full cost less
    assert trained.tokens == summary.tokens
    longer = plan(parsed.model_copy(update={"training": parsed.training.model_copy(update={"max_steps": 40})}), finished)
    assert longer.training_tokens_at_most == 10 * summary.tokens and longer.counted
    other = plan(DistillationSpec.model_validate(values | {"data": values["data"] | {"max_length": 32}}), finished)
    assert not other.counted and other.rows_at_least != counted.rows


def test_a_teacher_with_scores_costs_disk_and_no_time(spec):
    live = DistillationSpec.from_yaml(spec)
    teacher = f"{{id: t, model: {live.teachers[0].model}, scores: {{top_k: 8}}}}"
    scored = DistillationSpec.from_yaml(spec, [f"teachers=[{teacher}]"])
    sizes = model_sizes(live)
    assert (
        training_flops(scored, sizes, 6400)
        == sizes["student.model"].training_flops(6400, 32, False)
        < training_flops(live, sizes, 6400)
    )
    found = plan(scored)
    assert found.disk_bytes["scores"] == 50 * 32 * (8 * 6 + 16) and plan(live).disk_bytes["scores"] == 0
    assert found.memory["distill"] < plan(live).memory["distill"]


PILOT = """pilot={budget: 0.4, then: best, candidates: [{name: all}, {name: one, teachers: [t]}, {name: read, teachers: [s]}]}"""


def piloted(spec, *changes):
    """The spec for 100 steps, with a second teacher that is read from scores, held-out text of 640 bytes, a twin and a pilot."""
    held_out = spec.parent / "held-out.txt"
    held_out.write_text("y" * 640)
    model = DistillationSpec.from_yaml(spec).teachers[0].model
    teachers = f"teachers=[{{id: t, model: {model}}}, {{id: s, model: {model}, scores: {{top_k: 8}}}}]"
    given = [teachers, "training.max_steps=100", f"data.validation={held_out}", "evaluation.ce_baseline=true", PILOT, *changes]
    return DistillationSpec.from_yaml(spec, given)


def test_a_pilots_tasks_are_planned_as_the_dag_has_them(spec):
    """Each by its steps, tokens and hours; later rungs are taken to hold the dearest candidates."""
    parsed = piloted(spec)
    found = plan(parsed)
    names = [task.task for task in found.tasks]
    dag = documents(compile_spec(parsed))[0]["root"]["dag"]["tasks"]
    assert set(names) == {name for name in dag if name.startswith(("score", "evaluate", "trial", "distill"))}
    of = {task.task: task for task in found.tasks}
    assert {name: of[name].steps for name in of if name.startswith("trial")} == {
        "trial-1-ce": 2, "trial-1-all": 2, "trial-1-one": 2, "trial-1-read": 2, "trial-2-ce": 4, "trial-2-0": 4, "trial-2-1": 4,
        "trial-3-ce": 8, "trial-3-0": 8,
    }  # fmt: skip
    assert (
        of["trial-3-0"].tokens == 8 * 20 * 32
        and of["score-s"].tokens == 50 * 32
        and of["evaluate-teachers"].tokens == 2 * 2 * 160
    )
    assert of["distill"].gpu_hours == pytest.approx(found.gpu_hours, abs=1e-3) and found.all_gpu_hours >= found.gpu_hours
    assert found.disk_bytes["trial"] == found.disk_bytes["student"] // 2 + found.disk_bytes["checkpoints"]
    assert found.disk_bytes["twin"] == found.disk_bytes["student"] + found.disk_bytes["checkpoints"]
    assert {"score", "trial", "audit"} <= found.memory.keys() and found.memory["trial"] == found.memory["distill"]
    stopped = {task.task for task in plan(piloted(spec, "pilot.then=stop")).tasks}
    assert stopped == {
        name for name in names if "distill" not in name and name not in ("evaluate-student-after", "evaluate-baseline")
    }
    with pytest.raises(InputError, match="^pilot.budget: leaves 0 of 10 steps to the shortest runs"):
        plan(piloted(spec, "training.max_steps=10"))
    assert plan(piloted(spec, "training={epochs: 1, global_batch_size: 20}")).all_gpu_hours is None  # rows are only estimated


def test_short_runs_cost_what_their_candidates_train(spec):
    """At a finished pilot's speed: operations of student and teachers, in seconds of its own short runs."""
    parsed = piloted(spec, "pilot.then=stop")
    sizes = model_sizes(parsed)
    flops = {
        name: training_flops(as_candidate(parsed, candidate), sizes, 1280, alone=name == "ce")
        for name, candidate in candidates_of(parsed).items()
    }
    assert flops["ce"] == flops["read"] < flops["one"] == flops["all"]
    trials = [
        Trial(candidate=name, rung=1, steps=2, tokens=1280, seconds_per_step=5e4 * flops[name] / sum(flops.values()))
        for name in flops
    ]
    verdict = Pilot(
        steps=100,
        chosen="ce",
        reason="",
        enough_text=True,
        outlooks=[],
        trials=[*trials, Trial(candidate="all", rung=2, failed="nan")],
    )
    finished = Run.collect(parsed).model_copy(update={"pilot": verdict})
    found = plan(parsed, finished)
    assert found.speed.endswith("in the run planned") and "measured" in found.speed
    hours = {task.task: task.gpu_hours for task in found.tasks}
    measured = 2 * sizes["student.model"].forward_flops(160, 32)
    for name in flops:
        expected = 1e5 * (flops[name] + measured) / sum(flops.values()) / 3600
        assert hours[f"trial-1-{name}"] == pytest.approx(expected, rel=1e-3)
    assert found.gpu_hours == pytest.approx(50 * 1e5 * flops["all"] / sum(flops.values()) / 3600, rel=1e-3)


def test_the_command_and_resolve_tell_the_same(spec):
    result = CliRunner().invoke(cli, ["plan", str(spec), "--set", "student.keep_layers=2"])
    assert result.exit_code == 0, result.output
    parsed = DistillationSpec.from_yaml(spec, ["student.keep_layers=2"])
    resolved = resolve(parsed.to_json()).plan
    assert resolved == plan(parsed)
    told = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert f"{resolved.models[0].parameters:,} weights" in told["download student.model"]
    assert told["tokens of training"].strip() == "at most 6,400"
