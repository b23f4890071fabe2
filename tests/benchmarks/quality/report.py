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
    speed: float
    """Steps a second of the student, its teacher's hidden states at hand, of those runs of the arm that shared their GPU with the fewest."""
    lines: tuple[dict[str, Any], ...]

    def mean(self, text: str) -> float:
        """Bits per byte of a held-out text."""
        return statistics.mean(line["held_out"][text] for line in self.lines)

    def error(self, text: str) -> float | None:
        """Its standard error over the seeds; None with one seed."""
        values = [line["held_out"][text] for line in self.lines]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

    @property
    def seconds(self) -> float:
        """GPU seconds of the run, its teacher's hidden states at hand."""
        return self.steps / self.speed


def read(folder: Path) -> list[Row]:
    """The results in a folder's .jsonl files (or in one such file), arms of several seeds together; failed ones left out."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
    lines = [json.loads(text) for file in files for text in file.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    speeds: dict[tuple[Any, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if "failed" not in line:
            job, same = line["job"], (line["job"]["setting"], line["job"]["arm"]["name"], line["job"].get("batch"))
            groups[*same, job["steps"], job["rate"]].append(line)
            speeds[same][line.get("workers", 1)].append(line["steps_per_second"])
    return [
        Row(key[0], _name(*key[1:]), key[3], key[4], statistics.mean(min(speeds[key[:3]].items())[1]), tuple(lines))
        for key, lines in groups.items()
    ]


def _name(arm: str, batch: int | None, _: int, rate: float | None) -> str:
    """Of an arm, with what its jobs changed of the setting."""
    return arm + ("" if batch is None else f", batch {batch}") + ("" if rate is None else f", rate {rate:g}")


def same_time(row: Row, others: Sequence[Row], text: str, extra: float = 0.0) -> float | None:
    """What CE alone reaches in the GPU seconds of a row, between the runs of CE of other lengths; None outside of them.

    extra: seconds that the row's teacher took beside.
    """
    points = sorted((ce.seconds, ce.mean(text)) for ce in others)
    for (t0, y0), (t1, y1) in zip(points, points[1:]):
        if t0 <= row.seconds + extra <= t1:
            return y0 + (y1 - y0) * math.log((row.seconds + extra) / t0) / math.log(t1 / t0)
    return None


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown, one part a setting, best arm first."""
    lines = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        texts = list(own[0].lines[0]["held_out"])
        ces = [row for row in own if row.arm == CE]
        lines += [f"### {setting}", "", f"| arm | steps | {' | '.join(texts)} | CE in the same GPU time | tokens/s | seeds |"]
        lines.append("|" + "---|" * (5 + len(texts)))
        for row in sorted(own, key=lambda row: (row.steps, row.mean(texts[0]))):
            at_time = None if row.arm == CE else same_time(row, ces, texts[0])
            speed = row.speed * statistics.mean(line["tokens_per_second"] / line["steps_per_second"] for line in row.lines)
            cells = [row.arm, row.steps, *(_with_error(row, text) for text in texts), "" if at_time is None else f"{at_time:.4f}"]
            lines.append("| " + " | ".join(map(str, [*cells, f"{speed:,.0f}", len(row.lines)])) + " |")
        lines.append("")
    return lines


def _with_error(row: Row, text: str) -> str:
    error = row.error(text)
    return f"{row.mean(text):.4f}" + ("" if error is None else f" ± {error:.4f}")


def picture(rows: Sequence[Row], path: Path) -> None:
    """Held-out bits per byte over GPU seconds, CE as a line, every other arm as a point with its name."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    figure = Figure(figsize=(7, 4.2 * len(settings)), layout="constrained")
    for axes, setting in zip(figure.subplots(len(settings), squeeze=False)[:, 0], settings):
        own = [row for row in rows if row.setting == setting and row.rate is None]
        text = next(iter(own[0].lines[0]["held_out"]))
        points = [(row, row.seconds, row.mean(text)) for row in own]
        ce = sorted((x, y) for row, x, y in points if row.arm == CE)
        axes.plot(*zip(*ce), "k.-", label="cross-entropy alone")
        for row, x, y in (point for point in points if point[0].arm != CE):
            axes.errorbar(x, y, yerr=row.error(text), fmt="o", markersize=4)
            axes.annotate(row.arm, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
        axes.set(title=setting, xlabel="GPU seconds, teacher's hidden states at hand", ylabel=f"{text}: bits per byte")
        axes.legend()
    figure.savefig(path)


def write_report(folder: Path, out: Path) -> None:
    """Writes OUT.md and OUT.svg."""
    rows = read(folder)
    out.with_suffix(".md").write_text("\n".join(table(rows)) + "\n", encoding="utf-8")
    picture(rows, out.with_suffix(".svg"))
