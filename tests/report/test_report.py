"""The report's numbers and words: verdict, intervals, tables, warnings, files."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.support.report_sample import parts, sample_run
from xtoken_core.errors import InputError
from xtoken_core.report.answer import answer_table, markdown, metrics
from xtoken_core.report.card import model_card
from xtoken_core.report.cautions import cautions
from xtoken_core.report.charts import MAX_POINTS, Series, Style, duration, line_chart, nice_ticks, number, tick_texts
from xtoken_core.report.compare import write_comparison
from xtoken_core.report.curves import charts, phase_bars, run_seconds, task_bars
from xtoken_core.report.dag import dag_picture
from xtoken_core.report.facts import run_facts, teacher_facts
from xtoken_core.report.page import render_report, write_report
from xtoken_core.report.projection_summary import density_picture
from xtoken_core.report.run import FORMAT, MAX_LINES, Run
from xtoken_core.report.tables import bits_table, parts_table, settings_that_differ, tasks_table
from xtoken_core.report.verdict import bits_difference, task_difference, verdict
from xtoken_core.results.evaluation import BitsPerByte, Documents, Evaluation, TaskScore
from xtoken_core.results.pilot import Outlook, Pilot
from xtoken_core.results.subject import BEFORE, BEST, LAST, TWIN_BEST, TWIN_LAST, Subject, teacher_subject
from xtoken_core.results.training import LogLine
from xtoken_core.results.workflow import ReadInput, Task
from xtoken_core.spec.pilot import CE


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return sample_run(tmp_path_factory.mktemp("run"))


def result(bits: list[float], size: list[int], subject: Subject = BEST) -> Evaluation:
    total = sum(bits) / sum(size)
    documents = Documents(corpus=["c"] * len(bits), bits=bits, bytes=size)
    return Evaluation(
        subject=subject, bits_per_byte=BitsPerByte(total=total, low=total - 0.2, high=total + 0.2, documents=documents)
    )


def with_documents(evaluation: Evaluation, documents: Documents, **bits: float | None) -> Evaluation:
    """The evaluation with other documents, and other bits per byte."""
    measured = evaluation.bits_per_byte.model_copy(update={"documents": documents, **bits})
    return evaluation.model_copy(update={"bits_per_byte": measured})


def replaced(run: Run, **fields: object) -> Run:
    """The run with other fields."""
    return run.model_copy(update=fields)


def changed(run: Run, levels: dict[Subject, float]) -> Run:
    """The run with other totals, documents shifted along."""
    results = []
    for old in run.results:
        bits = old.bits_per_byte
        shift = levels.get(old.subject, bits.total) - bits.total
        moved = [b + shift * n for b, n in zip(bits.documents.bits, bits.documents.bytes)]
        documents = bits.documents.model_copy(update={"bits": moved})
        results.append(with_documents(old, documents, total=bits.total + shift, low=bits.low + shift, high=bits.high + shift))
    return replaced(run, results=results)


def test_paired_difference_sees_through_the_texts_own_spread():
    rng = np.random.default_rng(0)
    size = rng.integers(500, 2000, 60)
    hard = rng.normal(2.0, 0.5, 60)  # some documents are far harder than others, for everybody
    a = result((size * hard).tolist(), size.tolist())
    b = result((size * (hard + 0.02 + rng.normal(0, 0.02, 60))).tolist(), size.tolist())
    paired = bits_difference(b, a)
    assert paired.paired and paired.exceeds_noise and paired.tone == "bad"
    assert paired.low < paired.value < paired.high and paired.high - paired.low < 0.02
    unpaired = bits_difference(with_documents(b, Documents()), a)
    assert not unpaired.paired and not unpaired.exceeds_noise
    assert unpaired.high - unpaired.value == pytest.approx(0.2 * 2**0.5)


def test_bootstrap_covers_what_it_says():
    """About 95 % of the intervals of a difference that is zero hold zero."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        size = rng.integers(500, 2000, 30)
        pair = [result((size * rng.normal(2.0, 0.1, 30)).tolist(), size.tolist()) for _ in "ab"]
        held += not bits_difference(*pair).exceeds_noise
    assert 85 <= held <= 99


def test_a_pilots_choice_is_whom_the_student_has_learned_from(run):
    """The header, the warnings and the card name no teacher that was not heard."""
    chosen = Outlook(candidate="alone", teachers=["smollm"])
    judged = Pilot(steps=9, chosen="alone", reason="Distil as alone.", enough_text=True, outlooks=[chosen], trials=[])
    weak = changed(replaced(run, pilot=judged), {teacher_subject("gemma"): 9.0, teacher_subject("smollm"): 8.0})
    assert [c.title for c in cautions(weak) if c.title.startswith("Teacher")] == [
        "Teacher smollm is no better than the student was before it began"
    ]
    licences = [ReadInput(field=f"teachers.{t}.model", uri=t, version="1", licence=t) for t in ("gemma", "smollm")]
    assert "Gemma's terms" in model_card(replaced(run, inputs=licences), "best")
    assert "Gemma's terms" not in model_card(replaced(weak, inputs=licences), "best")

    def header(told: Run) -> str:
        return re.search(r'<p class="roles">(.*?)</p>', render_report(told), re.DOTALL)[1]

    assert "gemma" not in header(weak) and ">smollm<" in header(weak)
    plain = header(replaced(weak, pilot=judged.model_copy(update={"chosen": CE})))
    assert "learned from its text only" in plain and "smollm<" not in plain
    waiting = header(replaced(weak, summary=None))
    assert "would learn from" in waiting and ">gemma<" in waiting and ">smollm<" in waiting
    assert any("every row was seen" in c.title for c in cautions(run))
    assert not any("every row was seen" in c.title for c in cautions(replaced(weak, summary=None)))


def test_a_small_change_is_not_told_as_none(run):
    before = next(r for r in run.results if r.subject == BEFORE).bits_per_byte.total
    headlines = [verdict(changed(run, {BEST: before * (1 - share)})).headline for share in (0.004, 0.26)]
    assert "(-0.4 %)" in headlines[0] and "(-26 %)" in headlines[1]


def test_one_document_proves_nothing(run):
    alone = []
    for who, total in ((BEFORE, 3.0), (BEST, 2.0)):
        documents = Documents(corpus=["c"], bits=[total * 1000], bytes=[1000])
        alone.append(Evaluation(subject=who, bits_per_byte=BitsPerByte(total=total, documents=documents)))
    difference = bits_difference(alone[1], alone[0])
    assert difference.value == -1 and not difference.exceeds_noise
    single = replaced(run, results=alone)
    assert verdict(single).headline.startswith("One document says little: from 3.000 to 2.000")
    for text in (answer_table(single), render_report(single), markdown(single)):
        assert "noise unknown" in text and "one document: none" in text and not re.search(r"[+-]?inf\b|nan", text)


def test_benchmark_difference_knows_which_way_is_better():
    def scored(value: float, **about: bool) -> Evaluation:
        score = TaskScore(value=value, low=value - 0.02, high=value + 0.02, **about)
        return Evaluation(subject=BEST, tasks={"t": score})

    assert task_difference("t", scored(0.6), scored(0.5)).tone == "good"
    assert task_difference("t", scored(0.6, higher_is_better=False), scored(0.5)).tone == "bad"
    assert task_difference("t", scored(0.51), scored(0.5)).tone == "even"
    assert task_difference("u", scored(0.51), scored(0.5)) is None


def test_verdict_of_a_run_that_helped(run):
    answer = verdict(run)
    assert answer.tone == "good" and answer.headline.startswith("Distillation helped: from 3.2")
    said = " ".join(answer.sentences)
    assert "At its best checkpoint the student is ahead of its twin" in said
    assert "At its last checkpoint the student is ahead of its twin" in said
    assert re.search(r"best teacher, gemma, stands at 1\.\d+: 6\d % of the gap", said)
    assert "Of 3 benchmarks 2 improved beyond the noise" in said


def test_a_last_checkpoint_that_is_the_best_is_told_once(run):
    best = {LAST: run.result(BEST).bits_per_byte, TWIN_LAST: run.result(TWIN_BEST).bits_per_byte}
    results = [r.model_copy(update={"bits_per_byte": best.get(r.subject, r.bits_per_byte)}) for r in run.results]
    (told,) = [line for line in verdict(run.model_copy(update={"results": results})).sentences if "twin" in line]
    assert told.startswith("At its best checkpoint, which is the last one, the student is ahead of its twin")


@pytest.mark.parametrize(
    ("levels", "tone", "words"),
    [
        ({BEST: 3.8}, "bad", "made the student worse"),
        ({TWIN_BEST: 1.5}, "mixed", "The student improved, but cross-entropy alone does better: from"),
        ({LAST: 3.0}, "mixed", "helped"),  # behind its twin at the last checkpoint
    ],
)
def test_verdict_is_plain_about_bad_news(run, levels, tone, words):
    answer = verdict(changed(run, levels))
    assert answer.tone == tone and words in answer.headline
    if tone == "mixed":
        assert "behind its twin" in " ".join(answer.sentences)


def test_verdict_within_the_noise(run):
    before = run.result(BEFORE)
    documents = before.bits_per_byte.documents
    wobble = np.random.default_rng(0).normal(0, 60, 24)
    documents = documents.model_copy(update={"bits": (np.array(documents.bits) + wobble).tolist()})
    noisy = with_documents(before, documents).model_copy(update={"subject": BEST})
    answer = verdict(replaced(run, results=[before, noisy]))
    assert answer.tone == "even" and answer.headline.startswith("No difference beyond the noise")


def test_verdict_names_overfitting_and_a_beaten_teacher(run):
    said = " ".join(verdict(changed(run, {BEST: 0.9, LAST: 1.4})).sentences)
    assert "overfits towards the end" in said and "now beats the best teacher, gemma" in said


def test_verdict_without_evaluations(run):
    assert verdict(replaced(run, results=[])).tone == "unknown"


def test_answer_table_says_who_stands_where(run):
    text = answer_table(run, {"report": "out/report.html", "student": "out/best"})
    lines = text.splitlines()
    names = ("student before", "student after, best", "CE twin, last", "teacher gemma", "teacher smollm")
    for who, name in zip((BEFORE, BEST, TWIN_LAST, teacher_subject("gemma"), teacher_subject("smollm")), names):
        total = run.result(who).bits_per_byte.total
        assert any(line.startswith(name) and f" {total:.3f}" in line for line in lines), who
    assert lines[-2:] == ["report:     out/report.html", "student:    out/best"]
    assert "Distillation helped" in text and text.isascii() and max(map(len, lines[:10])) <= 100


def test_metrics_and_markdown(run):
    figures = metrics(run)
    best, before = (run.result(who).bits_per_byte.total for who in (BEST, BEFORE))
    assert figures["bits_per_byte_student_after_best"] == pytest.approx(best, abs=1e-4)
    assert figures["bits_per_byte_gain"] == pytest.approx(before - best, abs=1e-4)
    assert 500 < figures["tokens_per_second"] < 900 and all(isinstance(v, float) for v in figures.values())
    text = markdown(run)
    assert "**Distillation helped" in text and text.count("\n| ") == 9


def test_tables_hold_the_results(run):
    table = bits_table(run)
    assert [row[0].text for row in table.rows][:2] == ["student before", "student after, best"] and len(table.rows) == 7
    assert table.columns[3:5] == ["kjv", "carroll"] and table.rows[1][2].tone == "good"
    scores = tasks_table(run)
    assert scores.columns[:4] == ["benchmark", "student before", "student after, best", "change"]
    changes = [row[3] for row in scores.rows]
    assert [change.tone for change in changes] == ["good", "even", "good"]
    assert "within the noise" in changes[1].note


def test_groups_of_benchmarks_unfold(run):
    table = parts_table(run)
    assert [row[0].text for row in table.rows] == ["mmlu_stem", "mmlu_humanities"] and table.rows[0][
        0
    ].note == "acc, 3-shot, n = 3,153"
    assert "mmlu_stem" not in [row[0].text for row in tasks_table(run).rows]
    assert parts_table(replaced(run, results=[])) is None


def test_settings_that_differ():
    one = {"training": {"seed": 0, "max_steps": 5}, "teachers": [{"id": "a", "weight": 1.0}]}
    two = {"training": {"seed": 1, "max_steps": 5}, "teachers": [{"id": "a", "weight": 0.5}, {"id": "b", "weight": 0.5}]}
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in settings_that_differ({"x": one, "y": two}).rows}
    assert rows == {"training.seed": ["0", "1"], "teachers.a.weight": ["1.0", "0.5"], "teachers.b.weight": ["(absent)", "0.5"]}
    assert settings_that_differ({"x": one, "y": one}) is None


def titles(run: Run) -> str:
    return " | ".join(caution.title for caution in cautions(run))


def with_validation(run: Run, values: list[float]) -> Run:
    return replaced(run, log=[LogLine(step=10 * i, validation_bits_per_byte=v) for i, v in enumerate(values)])


def test_warnings_on_validation(run):
    assert "Overfitting: best long before the end, at step 20 of 50" in titles(with_validation(run, [3, 2.4, 2.2, 2.3, 2.5, 2.8]))
    assert "Still improving" in titles(with_validation(run, [3, 2.6, 2.4, 2.2, 2.0, 1.8]))
    settled = titles(with_validation(run, [3, 2.0, 1.9, 1.85, 1.849, 1.8485]))
    assert "Overfitting" not in settled and "Still improving" not in settled
    assert run.spec["evaluation"]["texts"] and "also measures it" not in settled
    same = replaced(run, spec=run.spec | {"evaluation": run.spec["evaluation"] | {"texts": []}})
    assert "The text that chose the best checkpoint also measures it" in titles(with_validation(same, [3, 2.0, 1.9]))


def test_warnings_on_teachers_chunks_rows_and_selection(run):
    assert "Teacher gemma is no better than the student was" in titles(changed(run, {teacher_subject("gemma"): 3.4}))
    train = run.prepare["train"]
    teachers = {"gemma": train.teachers["gemma"].model_copy(update={"exact_chunks": 100})}
    train = train.model_copy(update={"teachers": teachers, "dropped_documents": {"too short": 9}, "rows": 100_000})
    empty = run.projections["gemma"].model_copy(update={"rows": 1000, "empty": 400})
    poor = replaced(run, prepare={"train": train}, projections={"gemma": empty})
    assert "Only 1 % of the chunks shared with gemma" in titles(poor) and "40.0 % of the student's tokens" in titles(poor)
    assert "9 of 41 documents were left out" in titles(poor) and "Little text" not in titles(poor)
    assert "Never selected: smollm" in titles(replaced(run, log=[LogLine(step=1, selected="gemma")]))


def test_warnings_on_the_optimiser(run):
    lines = [LogLine(step=i, tokens=i, grad_norm=900.0 if i == 5 else 30.0, loss=None if i > 7 else 1.0) for i in range(10)]
    assert "Gradient spikes in 1 of 10" in titles(replaced(run, log=lines))
    assert "not finite in 2 of the logged steps" in titles(replaced(run, log=lines))
    assert "Gradient" not in titles(run)


def test_only_what_was_decided_while_training_is_drawn(run):
    def drawn(**loss: object) -> str:
        changed = replaced(run, spec=run.spec | {"loss": run.spec["loss"] | loss})
        return " ".join(chart.title for _, group in charts(changed) for chart in group)

    assert "Weight of each teacher" in drawn() and "Dynamic factor" in drawn()
    assert "Weight of each teacher" not in drawn(weight_metric=None) and "Dynamic factor" not in drawn(dynamic_scaling=False)
    fixed = replaced(run, spec=run.spec | {"loss": run.spec["loss"] | {"weight_metric": None}})
    assert ("weight", "1, fixed") in list(teacher_facts(fixed, fixed.spec["teachers"][0]))


def test_ticks_are_round_and_inside():
    for low, high in [(0, 1), (1.83, 3.22), (-0.2, 17), (0, 1e-3), (3e5, 9e6)]:
        ticks = nice_ticks(low, high, 5)
        assert 3 <= len(ticks) <= 8 and low <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)
    assert tick_texts([0.0, 2.5e-4, 1e-3]) == ["0", "2.5e-4", "1e-3"]
    assert [number(v) for v in (0, 1234.5, 0.12345, 1e-9, 2.5e8)] == ["0", "1,234", "0.1235", "1e-9", "2.5e8"]
    assert [duration(s) for s in (0.44, 12.3, 59.7, 185, 3599, 7620)] == [
        "0.4 s",
        "12 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 07 min",
    ]


def test_long_curves_are_averaged_and_keep_their_level():
    chart = line_chart("t", "u", [Series("s", range(10_000), np.linspace(1, 2, 10_000))])
    assert len(chart.curves[0].places) == MAX_POINTS and chart.curves[0].line.count("L") == MAX_POINTS - 1
    assert float(chart.curves[0].places[-1][3]) == pytest.approx(2, abs=0.01)


def test_charts_of_little_and_of_much():
    assert line_chart("t", "u", [Series("s", [], [])]) is None
    assert line_chart("t", "u", [Series("s", [5], [2.0])]).curves[0].dots
    wide = [Series("s", [1, 2, 3], [0.01, 1, 100])]
    assert line_chart("t", "u", wide, Style(may_be_log=True)).logarithmic and not line_chart("t", "u", wide).logarithmic
    flat = line_chart("t", "u", [Series("s", [1, 2], [0.7, 0.7])])
    assert "NaN" not in flat.curves[0].line and len(flat.y_ticks) > 1


def test_dag_has_no_box_over_another(run):
    picture = dag_picture(run.tasks)
    assert len(picture.boxes) == len(run.tasks)
    for i, a in enumerate(picture.boxes):
        assert a.y >= 0 and a.y + 54 <= picture.height and a.x + 142 <= picture.width
        assert all(abs(a.x - b.x) >= 142 or abs(a.y - b.y) >= 54 for b in picture.boxes[:i])
    at = {box.name: box.x for box in picture.boxes}
    assert all(at[before] < at[task.name] for task in run.tasks for before in task.after)
    assert len(picture.edges) < sum(len(task.after) for task in run.tasks)  # resolve -> distill and the like go without saying


def test_density_is_darkest_where_most_weight_lies():
    picture = density_picture([[0, 1], [0, 500]])
    assert picture.paths[-1] == (1.0, "M1 1h1v1h-1z") and all("M0" not in path for _, path in picture.paths)


def test_report_is_one_file_without_outside_resources(run, tmp_path):
    page = write_report(run, tmp_path).read_text()
    assert not re.search(r"""(src|href)=["'](?!#|data:)|url\(|@import|https?://""", page)
    assert len(page) < 400_000
    assert "&lt;student_before&gt;" in page and "<student_before>" not in page and "<of>" not in page
    for heading in ("Did it help?", "Results", "Curves", "Where the time went", "Tokenizers", "Text samples", "What was run"):
        assert f"<h2>{heading}</h2>" in page


def test_run_json_restores_the_run(run, tmp_path):
    write_report(run, tmp_path)
    assert Run.load(tmp_path / "run.json") == run
    assert render_report(Run.load(tmp_path / "run.json")) == (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("missing", ["log", "baseline_log", "summary", "results", "overlap", "projections", "prepare", "tasks"])
def test_every_part_may_be_missing(run, missing):
    page = render_report(replaced(run, **{missing: Run.model_fields[missing].get_default()}))
    assert "<h2>What was run</h2>" in page


def test_report_of_a_spec_alone(run):
    page = render_report(Run(format=FORMAT, spec=run.spec, settings=run.settings, name="bare"))
    assert "were not both measured" in page and 'id="curves"' not in page


def test_files_that_are_no_json(tmp_path):
    files = parts(tmp_path)
    log = files["training"] / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 12')  # a run that was killed while writing
    assert len(Run.collect(**files).log) == whole.count("\n")
    log.write_text('{"step": 1, "ce": NaN}\n')
    assert Run.collect(**files).log == [LogLine(step=1, ce=None)]
    log.write_text("{oops\n" + whole)
    with pytest.raises(InputError, match="log.jsonl: line 1"):
        Run.collect(**files)
    (tmp_path / "other.json").write_text("{}")
    for path in ("other.json", "none.json"):
        with pytest.raises(InputError, match=path):
            Run.load(tmp_path / path)


def test_long_logs_are_thinned(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [{"step": i, "tokens": i} if i % 100 else {"step": i, "validation_bits_per_byte": 2.0} for i in range(20_000)]
    log.write_text("\n".join(map(json.dumps, lines)))
    kept = Run.collect(parts(tmp_path / "run")["spec"], tmp_path).log
    assert sum(line.of_training for line in kept) <= MAX_LINES and sum(not line.of_training for line in kept) == 200
    assert [line.step for line in kept] == sorted(line.step for line in kept) and kept[-1].step > 19_900


def test_a_prompt_of_two_corpora_is_shown_once(run):
    doubled = [r.model_copy(update={"samples": 2 * r.samples}) for r in run.results]
    assert render_report(replaced(run, results=doubled)).count('class="prompt"') == 3
    assert render_report(replaced(run, results=doubled)).count("<h4>student before</h4>") == 3


@pytest.mark.parametrize("mode", ["partition_kl", "h_kl"])
def test_what_is_no_distance_is_not_called_one(run, mode):
    summary = run.summary.model_copy(update={"modes": {"gemma": mode}})
    page = render_report(replaced(run, summary=summary))
    assert ("a score, not a distance" in page) == (mode == "h_kl")


def test_bars_of_time(run):
    phases = {bar.label: bar for bar in phase_bars(run)}
    assert list(phases)[:2] == ["student", "gemma"] and phases["gemma"].text == "1 min 01 s" and phases["student"].length == 100
    tasks = task_bars(run)
    assert tasks[0].label == "distill" and not any(bar.pale for bar in tasks[:-2])
    assert [(bar.label, bar.text, bar.note) for bar in tasks[-2:]] == [  # they took no time in this run
        ("projections", "5.9 s", "from cache"),
        ("overlap", "4.8 s", "from cache"),
    ]


def test_the_run_took_what_its_own_tasks_took(run):
    times = {"resolve": (100.0, 5.0, "done"), "overlap": (10.0, 3.0, "cached"), "distill": (106.0, 60.0, "done")}
    tasks = [Task(name=n, start=s, seconds=t, status=status) for n, (s, t, status) in times.items()]
    assert run_seconds(replaced(run, tasks=tasks)) == 66 and run_seconds(run) is None
    assert "1 min 06 s from the start" in render_report(replaced(run, tasks=tasks))


def test_the_dag_tells_what_came_from_the_cache(run):
    lines = {box.name: box.lines[-1] for box in dag_picture(run.tasks).boxes}
    assert lines["overlap"] == "from cache, 4.8 s" and lines["distill"] == "3 min 34 s" and lines["report"] == "done"


def test_the_dag_shows_shards_as_one_box():
    shards = [Task(name=f"prepare-{k}", after=["overlap"], seconds=60.0 * k + 1, status="cached") for k in range(12)]
    trained = Task(name="distill", after=["overlap", *(shard.name for shard in shards)], seconds=5.0)
    overlap = Task(name="overlap", seconds=1.0)
    picture = dag_picture([overlap, *shards, trained])
    assert [box.lines for box in picture.boxes] == [
        ["overlap", "1.0 s"], ["prepare", "12 shards", "from cache, 11 min 01 s"], ["distill", "5.0 s"]
    ]  # fmt: skip
    assert len(picture.edges) == 2
    scores = [Task(name=f"score-a-1-{k}", after=[f"prepare-{k}"], seconds=9.0 - k) for k in range(2)]
    assert dag_picture([overlap, *shards[:2], *scores]).boxes[-1].lines == ["score", "a-1-2 shards", "9.0 s"]
    assert dag_picture([overlap, Task(name="score-a-1", seconds=3.0)]).boxes[-1].lines == ["score", "a-1", "3.0 s"]
    partly = dag_picture([overlap, *shards[:2], shards[2].model_copy(update={"status": "done"}), trained])
    assert partly.boxes[1].lines == ["prepare", "3 shards", "2 min 01 s"]


def test_comparison(run, tmp_path):
    other = sample_run(tmp_path / "b", seed=1, shift=0.07, steps=300)
    page = write_comparison([run, other], tmp_path / "out" / "compare.html").read_text()
    assert "training.max_steps" in page and "training.learning_rate" not in page
    assert re.search(r"\(2\) is worse than .*\(1\): \+0\.070", page)
    assert page.count('<figure class="chart') == 7
    with pytest.raises(InputError, match="two runs"):
        write_comparison([run], tmp_path / "x.html")
    with pytest.raises(InputError, match=f"^{tmp_path}: Is a directory"):
        write_comparison([run, other], tmp_path)


def test_comparison_of_runs_on_other_documents_colours_nothing(run, tmp_path):
    other = sample_run(tmp_path / "b", seed=1, shift=0.07, steps=300)
    for measured in other.results:
        measured.bits_per_byte.documents.bytes[0] += 1
    page = write_comparison([run, other], tmp_path / "compare.html").read_text()
    results = page.split("Bits per byte of held-out text, lower is better; below each")[0].rpartition("<table")[2]
    assert "not all on the same documents: careful" in page and "not on the same documents: careful" in page
    assert 'class="bad' not in results and 'class="good' not in results


def test_comparison_names_runs_by_their_place(run, tmp_path):
    other = replaced(run, spec=run.spec | {"output": {"uri": "s3://bucket/second"}})
    page = write_comparison([run, other], tmp_path / "compare.html").read_text()
    assert f"{run.name} (demo)" in page and f"{run.name} (second)" in page and "None: the runs have equal specs" in page


def test_a_run_that_lost_to_its_twin_says_so_at_the_top_of_a_comparison(run, tmp_path):
    twin, best = run.result(TWIN_BEST), run.result(BEST)
    lost = run.model_copy(
        update={
            "name": "loser",
            "results": [
                result.model_copy(update={"bits_per_byte": twin.bits_per_byte})
                if result.subject == BEST
                else result.model_copy(update={"bits_per_byte": best.bits_per_byte})
                if result.subject == TWIN_BEST
                else result
                for result in run.results
            ],
        }
    )
    page = write_comparison([run, lost], tmp_path / "page.html").read_text()
    summary = page[page.index('id="summary"') : page.index('id="settings"')]
    assert "loser lost to its own twin" in summary and f"{run.name} lost to its own twin" not in summary


def test_a_fall_of_the_agreement_is_a_caution(run):
    assert "agrees with gemma less" not in titles(run)
    low = {"gemma": run.result(BEFORE).agreement["gemma"].model_copy(update={"top1": 0.1})}
    results = [r.model_copy(update={"agreement": low}) if r.subject == BEST else r for r in run.results]
    assert "The student agrees with gemma less than before" in titles(run.model_copy(update={"results": results}))


def test_the_report_says_where_the_student_is_and_what_it_cost(run):
    page = render_report(run)
    assert 'from_pretrained("runs/demo/student/best")' in page and "vllm serve runs/demo/student/best" in page
    assert dict(run_facts(run))["training cost"].endswith(" hours of this machine")
