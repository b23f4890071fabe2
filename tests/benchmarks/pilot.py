"""Does the pilot's interval hold the truth? `python -m tests.benchmarks.pilot RESULTS.jsonl...`

Reads the lab's lines (`tests.benchmarks.quality`). Where one arm and cross-entropy were trained at several lengths, each with its whole
schedule, the gain of the longest is foretold from the shorter ones as the pilot foretells it. Prints one JSON line a case, a summary last.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xtoken_core.evaluation.outlook import Point, forecast, gain_slope

Runs = dict[tuple[Any, ...], dict[int, float]]
"""Held-out bits per byte by steps, of each (setting, text, seed, arm)."""

NOISE = 0.0006
"""Standard deviation between two runs of one arm, where no arm has two seeds."""


def read(paths: Sequence[str | Path]) -> Runs:
    """The runs of result files, whose settings are told apart by all that is not the arm, the seed or the length."""
    runs: Runs = defaultdict(dict)
    for line in (line for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()):
        found = json.loads(line)
        if "held_out" not in found or "job" not in found:
            continue
        job = found["job"]
        setting = (job["setting"], job.get("rate"), job.get("batch"))
        arm = json.dumps(job["arm"], sort_keys=True) if job["arm"].get("loss") is not None else "ce"
        for text, bits in found["held_out"].items():
            runs[(*setting, text, job["seed"], arm)][job["steps"]] = bits
    return runs


def noise(runs: Runs) -> dict[tuple[Any, ...], float]:
    """By setting and text the standard deviation between seeds, pooled over arms and lengths."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for (*setting, _, arm), outcomes in runs.items():
        for steps, bits in outcomes.items():
            groups[(*setting, arm, steps)].append(bits)
    squares: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for (*setting, _, _), values in groups.items():
        if len(values) > 1:
            squares[tuple(setting)] += [float(np.var(values, ddof=1))] * (len(values) - 1)
    return {setting: float(np.sqrt(np.mean(found))) for setting, found in squares.items()}


def cases(runs: Runs) -> Iterator[dict[str, Any]]:
    """Every length of an arm that at least two shorter ones foretell; each set of the shortest ones is a case."""
    between = noise(runs)
    for (*setting, seed, arm), outcomes in runs.items():
        reference = runs.get((*setting, seed, "ce"))
        if arm == "ce" or reference is None:
            continue
        error = between.get(tuple(setting), NOISE)
        lengths = sorted(outcomes.keys() & reference.keys())
        others = [own for (*s, e, a), own in runs.items() if s == setting and e == seed and a != "ce"]
        for end in lengths:
            for count in range(2, lengths.index(end) + 1):
                short = lengths[:count]
                curve = [Point(steps, reference[steps], error) for steps in short]
                gains = [[Point(s, reference[s] - own[s], 2**0.5 * error) for s in short if s in own] for own in others]
                mine = [Point(s, reference[s] - outcomes[s], 2**0.5 * error) for s in short]
                found = forecast(mine, end, gain_slope(curve, gains), 2**0.5 * error)
                truth = reference[end] - outcomes[end]
                yield {
                    "setting": [part for part in setting if part is not None],
                    "arm": json.loads(arm)["name"],
                    "seed": seed,
                    "short": short,
                    "long": end,
                    "measured": [round(point.value, 4) for point in mine],
                    "expected": round(found.value, 4),
                    "interval": [round(found.low, 4), round(found.high, 4)],
                    "truth": round(truth, 4),
                    "held": found.low <= truth <= found.high,
                }


def main(paths: Sequence[str]) -> None:
    """Prints the cases and their summary."""
    found = list(cases(read(paths)))
    for case in found:
        print(json.dumps(case))
    held = sum(case["held"] for case in found)
    sides = sum(np.sign(case["expected"]) == np.sign(case["truth"]) for case in found)
    print(
        json.dumps({"cases": len(found), "held": held, "share": held / len(found) if found else None, "sign_right": int(sides)})
    )


if __name__ == "__main__":
    main(sys.argv[1:])
