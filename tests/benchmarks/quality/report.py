"""One table and one picture from the lab's JSON lines."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

CE = "ce"
"""Name of the arm that all others are compared with."""


@dataclass(frozen=True)
class Row:
    """The seeds of one arm of a setting, of one length and one learning rate."""

    setting: str
    arm: str
    """Its name; after a comma, what its jobs changed of the setting."""
    steps: int
    rate: float | None
    speed: float | None
    """Steps a second of the student, its teacher's hidden states at hand, in runs of the arm that had their GPU to themselves; None: none."""
    lines: tuple[dict[str, Any], ...]

    def mean(self, measure: str) -> float:
        """Bits per byte of a held-out text, or the share of right answers of a task."""
        return statistics.mean(measures(line)[measure] for line in self.lines)

    def error(self, measure: str) -> float | None:
        """Its standard error over the seeds; None with one seed."""
        values = [measures(line)[measure] for line in self.lines]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

    @property
    def step_tokens(self) -> float:
        """Tokens of a step, padding included, as far as the digits of its speed tell."""
        return statistics.mean(line["tokens_per_second"] / line["steps_per_second"] for line in self.lines)

    @property
    def tokens(self) -> float:
        """Of the whole run."""
        return self.steps * self.step_tokens

    def as_long_as(self, other: Row) -> bool:
        """Whether both saw as many tokens."""
        return math.isclose(self.tokens, other.tokens, rel_tol=0.02)

    @property
    def best(self) -> float | None:
        """The lowest bits per byte on the way, of the first held-out text: what a run reaches that keeps its best checkpoint."""
        curves = [[point[1] for point in line["curve"]] for line in self.lines if isinstance(line["curve"][0], list)]
        return statistics.mean(map(min, curves)) if curves else None

    @property
    def seconds(self) -> float | None:
        """GPU seconds of the run, its teacher's hidden states at hand."""
        return None if self.speed is None else self.steps / self.speed


def measures(line: dict[str, Any]) -> dict[str, float]:
    """What was measured of a trained student: held-out texts in order, then tasks."""
    return line["held_out"] | line.get("tasks", {})


def read(folder: Path) -> list[Row]:
    """The results in a folder's .jsonl files (or in one such file), arms of several seeds together; failed ones left out."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
    lines = [json.loads(text) for file in files for text in file.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    speeds: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for line in lines:
        if "failed" not in line:
            job, same = line["job"], (line["job"]["setting"], line["job"]["arm"]["name"], line["job"].get("batch"))
            groups[*same, job["steps"], job["rate"]].append(line)
            if line.get("workers", 1) == 1:
                speeds[same].append(line["steps_per_second"])
    return [
        Row(key[0], _name(*key[1:]), key[3], key[4], statistics.mean(speeds[key[:3]]) if speeds[key[:3]] else None, tuple(lines))
        for key, lines in groups.items()
    ]


def _name(arm: str, batch: int | None, _: int, rate: float | None) -> str:
    """Of an arm, with what its jobs changed of the setting."""
    return arm + ("" if batch is None else f", batch {batch}") + ("" if rate is None else f", rate {rate:g}")


def same_time(row: Row, others: Sequence[Row], text: str) -> float | None:
    """What CE alone reaches in the GPU seconds of a row, between the runs of CE of other lengths; None outside of them."""
    points = sorted((ce.seconds, ce.mean(text)) for ce in others if ce.seconds is not None)
    for (t0, y0), (t1, y1) in zip(points, points[1:]):
        if row.seconds is not None and t0 <= row.seconds <= t1:
            return y0 + (y1 - y0) * math.log(row.seconds / t0) / math.log(t1 / t0)
    return None


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown, one part a setting, best arm first."""
    lines = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        texts = [name for name in measures(own[0].lines[0]) if all(name in measures(line) for row in own for line in row.lines)]
        ces = [row for row in own if row.arm == CE]
        names = ["arm", "steps", *texts, "best on the way", "CE in the same GPU time", "tokens/s", "seeds"]
        lines += [f"### {setting}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        for row in sorted(own, key=lambda row: (row.steps, row.mean(texts[0]))):
            at_time = None if row.arm == CE else same_time(row, ces, texts[0])
            cells = [row.arm, row.steps, *(_with_error(row, text) for text in texts), _figure(row.best), _figure(at_time)]
            speed = "" if row.speed is None else f"{row.speed * row.step_tokens:,.0f}"
            lines.append("| " + " | ".join(map(str, [*cells, speed, len(row.lines)])) + " |")
        lines.append("")
    return lines


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _with_error(row: Row, text: str) -> str:
    error = row.error(text)
    return f"{row.mean(text):.4f}" + ("" if error is None else f" ± {error:.4f}")


def picture(rows: Sequence[Row], path: Path) -> None:
    """Of each setting the arms that saw as many tokens as most did, best first, with their errors, on each held-out text; CE alone as a line."""
    groups = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        alike = max(([row for row in own if row.as_long_as(one)] for one in own), key=len)
        groups.append((f"{setting}, {alike[0].tokens / 1e6:.1f} M tokens", alike))
    groups = [group for group in groups if len(group[1]) > 1] or groups
    texts = list(groups[0][1][0].lines[0]["held_out"])
    figure = Figure(figsize=(3 + 3.5 * len(texts), sum(0.8 + 0.24 * len(own) for _, own in groups)), layout="constrained")
    grid = figure.subplots(
        len(groups), len(texts), squeeze=False, sharey="row", height_ratios=[3 + len(own) for _, own in groups]
    )
    for line, (title, own) in zip(grid, groups):
        own = sorted(own, key=lambda row: -row.mean(texts[0]))
        for axes, text in zip(line, own[0].lines[0]["held_out"]):
            errors = [row.error(text) or 0 for row in own]
            axes.errorbar([row.mean(text) for row in own], range(len(own)), xerr=errors, fmt="o", markersize=4)
            axes.set_yticks(range(len(own)), [row.arm for row in own], fontsize=7)
            axes.axvline(next((row.mean(text) for row in own if row.arm == CE), math.nan), color="black", linewidth=0.8)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel(f"{text}: bits per byte", fontsize=8)
            axes.tick_params(axis="x", labelsize=7)
    figure.savefig(path)


def write_report(folder: Path, out: Path) -> None:
    """Writes OUT.md and OUT.svg."""
    rows = read(folder)
    out.with_suffix(".md").write_text("\n".join(table(rows)) + "\n", encoding="utf-8")
    picture(rows, out.with_suffix(".svg"))
