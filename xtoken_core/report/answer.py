"""The few figures of a run: the terminal's table, KFP's metrics and Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from xtoken_core.report.markup import code, plain
from xtoken_core.report.run import Run
from xtoken_core.report.verdict import bits_difference, bits_limits, bits_per_byte, everybody, label, verdict
from xtoken_core.results.subject import BEFORE, TWIN_BEST

COLUMNS = ("", "bits per byte", "95 % interval", "against before", "tokens/s")


def answer_table(run: Run, places: Mapping[str, str] | None = None) -> str:
    """The table that ends a run on the terminal: who stands where, whether it helped, and where things lie.

    `places`: what lies where, for example {"report": "out/report.html", "student": "out/best"}. Plain text, lines of some 100 columns.
    """
    rows = _rows(run)
    widths = [max(len(row[i]) for row in (COLUMNS, *rows)) for i in range(len(COLUMNS))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]) for row in (COLUMNS, *rows)
    ]
    rule = "-" * max(len(line) for line in lines)
    answer = verdict(run)
    where = [f"{what + ':':<12}{place}" for what, place in (places or {}).items()]
    table = [rule, lines[0], rule, *lines[1:], rule] if rows else []
    return "\n".join([*table, answer.headline, *answer.sentences, *([""] if where else []), *where])


def metrics(run: Run) -> dict[str, float]:
    """Scalars for KFP's `Metrics` artifact: bits per byte of everybody, gains, speed."""
    figures: dict[str, float | None] = {f"bits_per_byte_{result.subject.key}": bits_per_byte(result) for result in everybody(run)}
    for name, other in (("gain", BEFORE), ("gain_over_cross_entropy", TWIN_BEST)):
        if difference := bits_difference(run.result(other), run.after):
            figures[f"bits_per_byte_{name}"] = difference.value
    _, speeds = run.steps("tokens_per_second")
    figures["tokens_per_second"] = sorted(speeds)[len(speeds) // 2] if speeds else None
    return {name: round(value, 4) for name, value in figures.items() if value is not None}


def markdown(run: Run) -> str:
    """The verdict, its table and where the run is published, for KFP's `Markdown` artifact."""
    return "\n".join(
        [f"## {plain(run.name)}", "", *answer_lines(run), "", f"Published at {code(run.spec['output']['uri'])}.", ""]
    )


def answer_lines(run: Run) -> list[str]:
    """The verdict and its table as lines of Markdown."""
    answer = verdict(run)
    cells = (COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 1), *_rows(run))
    rows = [f"| {' | '.join(map(plain, row))} |" for row in cells]
    return [f"**{plain(answer.headline)}**", "", *(f"- {plain(s)}" for s in answer.sentences), "", *rows]


def _rows(run: Run) -> list[list[str]]:
    """One row of text for everybody who was evaluated."""
    rows = []
    for result in everybody(run):
        measured = result.bits_per_byte
        gain = bits_difference(result, run.result(BEFORE)) if result.subject != BEFORE else None
        rows.append(
            [
                label(result.subject),
                f"{measured.total:.3f}" if measured and measured.total is not None else "-",
                bits_limits(measured) if measured else "-",
                f"{gain.value:+.3f}" + ("" if gain.exceeds_noise else " (noise)") if gain else "-",
                f"{result.tokens_per_second:,.0f}" if result.tokens_per_second else "-",
            ]
        )
    return rows
