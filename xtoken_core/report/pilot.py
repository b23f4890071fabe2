"""The pilot in the report: what is expected of each candidate, as a picture and a table."""

from __future__ import annotations

from dataclasses import dataclass

from xtoken_core.report.charts import Chart, Series, Spans, Style, interval_plot, line_chart
from xtoken_core.report.tables import MISSING, Cell, Table, short_name
from xtoken_core.report.verdict import Verdict, pilot_verdict
from xtoken_core.results.pilot import Extent, Outlook, Pilot
from xtoken_core.spec.pilot import CE


@dataclass(frozen=True)
class PilotSection:
    """The report's section."""

    verdict: Verdict
    expected: Spans | None
    chart: Chart | None
    table: Table
    by_text: Table | None


def pilot_section(pilot: Pilot | None) -> PilotSection | None:
    """The section of a run that has a pilot."""
    if pilot is None:
        return None
    rows = [
        (o.candidate, color, o.expected.value, o.expected.low, o.expected.high)
        for color, o in enumerate(pilot.outlooks)
        if o.expected
    ]
    unit = f"expected gain over cross-entropy only after {pilot.steps:,} steps, bits per byte, higher is better"
    return PilotSection(pilot_verdict(pilot), interval_plot(unit, rows), _chart(pilot), _table(pilot), _by_text(pilot))


def _chart(pilot: Pilot) -> Chart | None:
    """Gains over the steps: measured, and expected; of the best candidate with the ends of the interval."""
    series = []
    for color, outlook in enumerate(pilot.outlooks):
        steps = [gain.steps for gain in outlook.measured]
        series.append(Series(outlook.candidate, steps, [gain.value for gain in outlook.measured], color, points=True))
        lines = ("value", "low", "high") if outlook is pilot.outlooks[0] else ("value",)
        for line in lines:
            name = f"{outlook.candidate}, expected" if line == "value" else f"{outlook.candidate}, {line} end of 95 %"
            course = [getattr(gain, line) for gain in outlook.course]
            series.append(Series(name, [gain.steps for gain in outlook.course], course, color, dashed=True))
    return line_chart("Gain over cross-entropy only", "bits per byte, higher is better", series, Style(wide=True))


def _table(pilot: Pilot) -> Table:
    lengths = sorted({gain.steps for outlook in pilot.outlooks for gain in outlook.measured})
    columns = ["candidate", *(f"after {steps:,} steps" for steps in lengths), f"expected after {pilot.steps:,}", "at equal time"]
    caption = (
        "Bits per byte ahead of cross-entropy only, with 95 % intervals. At equal time: cross-entropy is given the steps that the candidate's "
        "time would buy."
    )
    return Table(columns, [_row(outlook, lengths) for outlook in pilot.outlooks], caption)


def _by_text(pilot: Pilot) -> Table | None:
    """Each candidate's longest run against cross-entropy of as many steps, on each held-out corpus; None where there is only one."""
    reference = {trial.steps: trial.per_corpus for trial in pilot.trials if trial.candidate == CE}
    longest = {trial.candidate: trial for trial in sorted(pilot.trials, key=lambda trial: trial.steps) if trial.per_corpus}
    texts = list(dict.fromkeys(text for trial in longest.values() for text in trial.per_corpus))
    rows = []
    for name in (outlook.candidate for outlook in pilot.outlooks if outlook.candidate in longest):
        own, other = longest[name], reference[longest[name].steps]
        gains = [other[text] - own.per_corpus[text] for text in texts]
        rows.append([Cell(f"{name}, {own.steps:,} steps"), *(Cell(f"{gain:+.4f}", gain) for gain in gains)])
    caption = "Where: bits per byte ahead of cross-entropy only after the longest run, by held-out corpus."
    return Table(["candidate", *map(short_name, texts)], rows, caption) if len(texts) > 1 and rows else None


def _row(outlook: Outlook, lengths: list[int]) -> list[Cell]:
    measured = {gain.steps: gain for gain in outlook.measured}
    about = f"{', '.join(outlook.teachers)}\n{', '.join(outlook.changes)}".strip()
    cost = f"a step takes {outlook.cost:.1f} times as long" if outlook.cost else ""
    return [
        Cell(outlook.candidate, note=outlook.failed or about),
        *(_cell(measured.get(steps)) for steps in lengths),
        _cell(outlook.expected),
        _cell(outlook.same_time, cost),
    ]


def _cell(found: Extent | None, note: str = "") -> Cell:
    if found is None:
        return MISSING
    tone = "good" if found.low > 0 else "bad" if found.high < 0 else "even"
    return Cell(f"{found.value:+.4f}", found.value, tone, note=f"{found.low:+.4f} to {found.high:+.4f}\n{note}".strip())
