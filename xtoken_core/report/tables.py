"""Tables of a report as data, which parts.html turns into sortable HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from xtoken_core.report.run import Run
from xtoken_core.report.verdict import Difference, bits_difference, bits_limits, everybody, label, score_difference
from xtoken_core.results.evaluation import Bits, Evaluation, TaskScore
from xtoken_core.results.subject import BEFORE, BEST, LAST, Subject
from xtoken_core.results.vocabulary import ClassCoverage, OverlapReport


@dataclass(frozen=True)
class Cell:
    """One cell: its text, the value it sorts by, and how it looks."""

    text: str
    sort: float | str | None = None
    """None: sorts by the text."""
    tone: str = ""
    """`good`, `bad`, `even`, or none."""
    heat: float | None = None
    """0 to 1: shades the cell."""
    note: str = ""
    """A second, smaller line."""


@dataclass(frozen=True)
class Table:
    """A table; the first column is text, the others are numbers."""

    columns: list[str]
    rows: list[list[Cell]]
    caption: str = ""
    code: bool = False
    """Whether every column is text, for code and names."""


MISSING = Cell("-", "Infinity")
"""Sorts last."""


def bits_table(run: Run) -> Table | None:
    """Bits per byte of everybody: total with interval, difference from the student before, per corpus."""
    found = [(result, result.bits_per_byte) for result in everybody(run) if result.bits_per_byte]
    if not found:
        return None
    corpora = list(dict.fromkeys(name for _, measured in found for name in measured.per_corpus))
    split = corpora if len(corpora) > 1 else []
    rows = []
    for result, measured in found:
        difference = bits_difference(result, run.result(BEFORE)) if result.subject != BEFORE else None
        rows.append(
            [
                Cell(label(result.subject)),
                bits_cell(measured),
                _difference(difference),
                *(bits_cell(measured.per_corpus.get(name)) for name in split),
                _speed(result),
            ]
        )
    caption = (
        "Bits per byte of held-out text, 95 % intervals below each; lower is better. Best: the checkpoint with the best validation. CE twin: the same "
        "student trained on cross-entropy alone, same rows and steps."
    )
    return Table(["model", "all text", "against before", *map(short_name, split), "evaluated tokens/s"], rows, caption)


def tasks_table(run: Run) -> Table | None:
    """Benchmarks side by side, with the student's change."""
    caption = "Benchmark scores, 0 to 1, with 95 % intervals. Change: the student after against before, over the same questions."
    return _tasks_table({result.subject: result.tasks for result in everybody(run)}, caption)


def parts_table(run: Run) -> Table | None:
    """What groups of benchmarks consist of, as MMLU of its fields."""
    parts = {
        result.subject: {name: part for group in result.tasks.values() for name, part in group.parts.items()}
        for result in everybody(run)
    }
    return _tasks_table(parts, "What groups of benchmarks consist of.")


def _tasks_table(scores: Mapping[Subject, Mapping[str, TaskScore]], caption: str) -> Table | None:
    """Of each one's entries by task, those who have none left out; the change stands beside the student that it is of."""
    scores = {who: entries for who, entries in scores.items() if entries}
    after = next((who for who in (BEST, LAST) if who in scores), None)
    tasks = list(dict.fromkeys(task for entries in scores.values() for task in entries))
    about = {task: next(of[task] for of in scores.values() if task in of) for task in tasks}
    columns = {"benchmark": [Cell(task, note=_about_task(about[task])) for task in tasks]}
    for who, entries in scores.items():
        columns[label(who)] = [_score(entries.get(task)) for task in tasks]
        if who == after and BEFORE in scores:
            columns["change"] = [
                _difference(score_difference(after, BEFORE, entries.get(t), scores[BEFORE].get(t))) for t in tasks
            ]
    return Table(list(columns), [list(row) for row in zip(*columns.values())], caption) if tasks else None


def agreement_table(run: Run) -> Table | None:
    """How often the student's states and its teachers agree on the likeliest next text, and how far apart they are."""
    found = [result for result in everybody(run) if result.agreement]
    teachers = [t for t in run.teachers if any(t in result.agreement for result in found)]
    rows = []
    for result in found:
        row = [Cell(label(result.subject))]
        for teacher in teachers:
            measured = result.agreement.get(teacher)
            top1, kl = (measured.top1, measured.kl) if measured else (None, None)
            row.append(Cell(f"{100 * top1:.1f} %", top1, heat=top1) if top1 is not None else MISSING)
            row.append(Cell(f"{kl:.3f}", kl) if kl is not None else MISSING)
        rows.append(row)
    columns = ["model", *(f"{t}: {what}" for t in teachers for what in ("same top-1", "KL, nats"))]
    return (
        Table(
            columns,
            rows,
            "Agreement with each teacher on validation text, per chunk, or per token with the student's vocabulary. The KL is that of the "
            "teacher's loss mode; with h_kl and gold, over the tokens in common alone, it can be below 0.",
        )
        if rows
        else None
    )


def coverage_table(overlap: OverlapReport | None) -> Table | None:
    """Which share of the student's tokens each teacher has exactly, by class of token."""
    teachers = {t: o.coverage for t, o in overlap.teachers.items() if o.coverage} if overlap else {}
    classes = list(dict.fromkeys(name for coverage in teachers.values() for name in coverage))
    rows = []
    for name in classes:
        cells = [_covered(coverage.get(name)) for coverage in teachers.values()]
        tokens = max(coverage[name].tokens for coverage in teachers.values() if name in coverage)
        rows.append([Cell(name.replace("_", " ")), Cell(f"{tokens:,}", tokens), *cells])
    return (
        Table(
            ["class of student token", "tokens", *teachers], rows, "Share of the student's tokens that the teacher has exactly."
        )
        if rows
        else None
    )


def overlap_table(overlap: OverlapReport | None) -> Table | None:
    """The pairwise vocabulary overlap as a heat map."""
    if overlap is None:
        return None
    names = overlap.matrix.names
    rows = [
        [Cell(name), *(Cell(f"{value:.3f}", value, heat=value) for value in values)]
        for name, values in zip(names, overlap.matrix.coefficient)
    ]
    return (
        Table(["", *names], rows, "Vocabulary overlap |A ∩ B| / min(|A|, |B|), over the bytes of tokens.")
        if len(names) > 1
        else None
    )


def corpora_table(run: Run) -> Table | None:
    """Every corpus that rows were made of."""
    rows = [
        [Cell(f"{split}: {name}"), *(Cell(f"{count:,}", count) for count in (corpus.documents, corpus.bytes))]
        for split, stats in run.prepare.items()
        for name, corpus in stats.corpora.items()
    ]
    return Table(["corpus", "documents", "bytes"], rows, "Corpora that rows were made of.") if rows else None


def inputs_table(run: Run) -> Table | None:
    """Every model and data set that was read, with its version."""
    rows = [[Cell(entry.field), Cell(entry.uri), Cell(entry.version)] for entry in run.inputs]
    caption = "Models and data as they were: commit of a hub id, else fingerprint."
    return Table(["field", "read from", "version"], rows, caption, code=True) if rows else None


def settings_that_differ(specs: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """The dotted fields in which several specs differ, a column for each; None where they are equal."""
    flat = {name: flattened(spec) for name, spec in specs.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    texts = {key: [_yaml(values[key]) if key in values else "(absent)" for values in flat.values()] for key in keys}
    rows = [[Cell(key), *map(Cell, row)] for key, row in texts.items() if len(set(row)) > 1]
    return Table(["setting", *flat], rows, code=True) if rows else None


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; teachers go by their id, other lists are values."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "id" in item for item in value):
        value = {item["id"]: {k: v for k, v in item.items() if k != "id"} for item in value}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf for name, item in value.items() for key, leaf in flattened(item, f"{prefix}.{name}" if prefix else name).items()
    }


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000).removesuffix("\n").removesuffix("\n...")


def short_name(uri: str) -> str:
    """The last part of a path or URI."""
    return uri.rstrip("/").rpartition("/")[2] or uri


def bits_cell(measured: Bits | None) -> Cell:
    """Bits per byte, with its interval below."""
    if measured is None or measured.total is None:
        return MISSING
    return Cell(f"{measured.total:.3f}", measured.total, note=bits_limits(measured))


def _difference(difference: Difference | None) -> Cell:
    if difference is None:
        return MISSING
    if math.isfinite(difference.low):
        note = f"{difference.low:+.3f} to {difference.high:+.3f}" + ("" if difference.exceeds_noise else "\nwithin the noise")
    else:
        note = "noise unknown"
    return Cell(f"{difference.value:+.3f}", difference.value, difference.tone, note=note)


def _score(entry: TaskScore | None) -> Cell:
    if entry is None or entry.value is None:
        return MISSING
    note = f"{entry.low:.3f} to {entry.high:.3f}" if entry.low is not None else ""
    return Cell(f"{entry.value:.3f}", entry.value, note=note)


def _about_task(entry: TaskScore) -> str:
    shots, samples = entry.shots, entry.samples
    measure, _, kind = entry.metric.partition(",")
    metric = measure.replace("_", " ") + (f" ({kind})" if kind not in ("", "none") else "")
    parts = [metric, f"{shots}-shot" if shots is not None else None, f"n = {samples:,}" if samples else None]
    return ", ".join(part for part in parts if part)


def _speed(result: Evaluation) -> Cell:
    speed = result.tokens_per_second
    return Cell(f"{speed:,.0f}", speed) if speed else MISSING


def _covered(entry: ClassCoverage | None) -> Cell:
    if entry is None or not entry.tokens:
        return MISSING
    return Cell(f"{100 * entry.share:.1f} %", entry.share, heat=entry.share)
