"""The page that puts runs side by side: settings that differ, curves over one another, results with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xtoken_core.errors import InputError
from xtoken_core.report.cautions import cautions
from xtoken_core.report.charts import Chart, Measured, Series, Style, interval_plot, line_chart
from xtoken_core.report.page import render
from xtoken_core.report.run import Run
from xtoken_core.report.tables import MISSING, Cell, Table, settings_that_differ, short_name
from xtoken_core.report.verdict import (
    Difference,
    bits_difference,
    bits_per_byte,
    interval,
    label,
    same_documents,
    task_difference,
    twin_differences,
    verdict,
)
from xtoken_core.results.subject import BEFORE, BEST, LAST, TWIN_BEST, TWIN_LAST, Subject

CURVES = (
    ("Validation", "bits per byte", "validation_bits_per_byte"),
    ("Training loss, cross-entropy part", "nats per token", "ce"),
    ("Distillation loss, all teachers", "KD term, nats", "kd"),
    ("Next token right", "% of training tokens", "accuracy"),
    ("Learning rate", "step size of AdamW", "learning_rate"),
    ("Throughput", "student tokens per second", "tokens_per_second"),
    ("Memory", "GiB, student and teachers", "memory_gib"),
)
STATES = (BEST, LAST, TWIN_BEST, TWIN_LAST, BEFORE)


def write_comparison(runs: Sequence[Run], out_html: str | Path) -> Path:
    """Writes the page that compares runs with the first of them. Raises InputError for fewer than two, or a page that cannot be written."""
    if len(runs) < 2:
        raise InputError("compare: needs two runs or more")
    page = Path(out_html)
    text = render_comparison(runs)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    except OSError as e:
        raise InputError(f"{page}: {e.strerror}") from None
    return page


def render_comparison(runs: Sequence[Run]) -> str:
    """The comparison as HTML."""
    runs = distinct_names(runs)
    return render(
        "compare.html",
        title=f"{len(runs)} runs side by side",
        runs=[(index, run, verdict(run), cautions(run)) for index, run in enumerate(runs)],
        summary=_summary(runs),
        standing=interval_plot("bits per byte of held-out text, lower is better", _standing(runs)),
        results=_bits_table(runs),
        tasks=_tasks_table(runs),
        settings=settings_that_differ(
            {run.name: {k: v for k, v in run.spec.items() if k not in ("name", "output")} for run in runs}
        ),
        charts=[chart for chart in (_curve(runs, *curve) for curve in CURVES) if chart],
    )


def distinct_names(runs: Sequence[Run]) -> list[Run]:
    """The same runs; those that share a name go by the last part of output.uri as well, or by a number where that is shared too."""
    named = [f"{run.name} ({short_name(run.spec['output']['uri'])})" for run in runs]
    if len(set(named)) < len(runs):
        named = [f"{run.name} ({number})" for number, run in enumerate(runs, 1)]
    names = [run.name for run in runs]
    return [run.model_copy(update={"name": name}) if names.count(run.name) > 1 else run for run, name in zip(runs, named)]


def _summary(runs: Sequence[Run]) -> list[str]:
    """What the runs' students are to the first one's, in plain words."""
    scored = [(score, run.name) for run in runs if (score := bits_per_byte(run.after)) is not None]
    careful = "" if all(same_documents(run.after, runs[0].after) for run in runs) else " (not all on the same documents: careful)"
    sentences = (
        [f"Best student: {min(scored)[1]}, {min(scored)[0]:.3f} bits per byte of held-out text{careful}."] if scored else []
    )
    words = {"good": "better than", "bad": "worse than", "even": "not told apart from"}
    for run in runs:
        lost = next((d for d in twin_differences(run) if d.tone != "good"), None)
        if lost:
            than = "lost to" if lost.tone == "bad" else "is not told apart from"
            sentences.append(f"{run.name} {than} its own twin trained on cross-entropy alone: {interval(lost)}.")
    for run in runs[1:]:
        if difference := bits_difference(run.after, runs[0].after):
            same = "" if same_documents(run.after, runs[0].after) else " (not on the same documents: careful)"
            sentences.append(f"{run.name} is {words[difference.tone]} {runs[0].name}: {interval(difference)}{same}.")
    return sentences


def _standing(runs: Sequence[Run]) -> list[Measured]:
    rows: list[Measured] = []
    for color, run in enumerate(runs):
        for subject in (BEST, LAST):
            result = run.result(subject)
            if result and (measured := result.bits_per_byte) and measured.total is not None:
                rows.append((f"{run.name}, {subject.state}", color, measured.total, measured.low, measured.high))
    return rows


def _bits_table(runs: Sequence[Run]) -> Table | None:
    """A run a row: bits per byte of its student's and its twin's states, and their differences from the first run's."""
    states = [who for who in STATES if any(bits_per_byte(run.result(who)) is not None for run in runs)]

    def cell(run: Run, who: Subject) -> Cell:
        own, first = run.result(who), runs[0].result(who)
        difference = bits_difference(own, first) if run is not runs[0] and same_documents(own, first) else None
        return _cell(bits_per_byte(own), difference)

    rows = [[Cell(run.name), *(cell(run, who) for who in states)] for run in runs]
    caption = (
        "Bits per byte of held-out text, lower is better; below each the difference from the first run with its 95 % interval, "
        "where both were measured on the same documents."
    )
    return Table(["run", *map(label, states)], rows, caption) if states else None


def _tasks_table(runs: Sequence[Run]) -> Table | None:
    """A run a row: its student's benchmark scores, and their differences from the first run's."""
    tasks = list(dict.fromkeys(task for run in runs for task in (run.after.tasks if run.after else ())))
    rows = []
    for run in runs:
        entries = [run.after.tasks.get(task) if run.after else None for task in tasks]
        differences = [task_difference(task, run.after, runs[0].after) if run is not runs[0] else None for task in tasks]
        rows.append([Cell(run.name), *(_cell(entry.value if entry else None, d) for entry, d in zip(entries, differences))])
    return Table(["run", *tasks], rows, "Benchmark scores of the student after distillation.") if tasks else None


def _cell(value: float | None, difference: Difference | None) -> Cell:
    if value is None:
        return MISSING
    note = interval(difference) + ("" if difference.exceeds_noise else "\nwithin the noise") if difference else ""
    return Cell(f"{value:.3f}", value, difference.tone if difference else "", note=note)


def _curve(runs: Sequence[Run], title: str, unit: str, key: str) -> Chart | None:
    few = key == "validation_bits_per_byte"
    series = [Series(run.name, *run.steps(key), color, points=few) for color, run in enumerate(runs)]
    if key == "accuracy":
        series = [replace(one, values=[100 * value for value in one.values]) for one in series]
    return line_chart(title, unit, series, Style(wide=few))
