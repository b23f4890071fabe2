"""Does the pilot's interval hold the truth? `python -m tests.benchmarks.pilot RESULTS.jsonl...`

Reads lines of the lab (`tests.benchmarks.quality`) and of `tests.benchmarks.pilot_runs`. Where one arm and cross-entropy were trained at several
lengths, each with its whole schedule, the gain of the longest is foretold from the shorter ones as the pilot foretells it. Prints one JSON
line a case; then the summary, which also leaves out one setting after another: what the constants would be without it, by the likelihood of
the others' truths, and the factor on their intervals that conformal prediction asks for (Vovk et al., 2005), checked on the setting itself.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xtoken_core.evaluation.outlook import PRIOR, Forecast, Point, Prior, forecast, gain_slope

Runs = dict[tuple[Any, ...], dict[int, float]]
"""Held-out bits per byte by steps, of each (setting, text, seed, arm)."""

NOISE = 0.0009
"""Standard deviation between seeds of a gain, where no arm has two."""

WAYS = ("plain", "fitted", "conformal")
"""Intervals that a setting gets from the others: the pilot's constants, constants fitted to them, the pilot's with their conformal factor."""

LEVEL = 0.9
"""Share of the cases that intervals are to hold."""

PLAIN = replace(PRIOR, widened=1.0)
"""The pilot's constants without the factor."""

GRID = [
    Prior(*values, widened=1.0)
    for values in itertools.product((0.1, 0.2, 0.3, 0.5, 0.8, 1.2), (2.0, 3.0, 6.0, 12.0), (1.0, 3.0, 10.0))
]
"""Constants that are tried where they are fitted."""


@dataclass(frozen=True)
class Case:
    """A gain that was measured, and what its pilot would have known."""

    setting: tuple[Any, ...]
    """With the text."""
    arm: str
    seed: int
    long: int
    """Steps."""
    curve: list[Point]
    """Cross-entropy's short runs."""
    gains: list[list[Point]]
    """Of all arms."""
    own: list[Point]
    error: float
    """Of the measured gain."""
    truth: float

    def foretold(self, prior: Prior = PRIOR) -> Forecast:
        """What the pilot would have said."""
        return forecast(self.own, self.long, gain_slope(self.curve, self.gains, prior), self.error, prior)

    def score(self, prior: Prior = PRIOR) -> float:
        """How far off the truth is, in half widths of the interval."""
        found = self.foretold(prior)
        return abs(self.truth - found.value) / (found.high - found.value)

    def likelihood(self, prior: Prior) -> float:
        """Log density of the truth under the forecast."""
        found = self.foretold(prior)
        return -((self.truth - found.value) ** 2) / (2 * found.error**2) - math.log(found.error)

    def told(self) -> dict[str, Any]:
        """The case for people."""
        found = self.foretold()
        return {
            "setting": [part for part in self.setting if part is not None],
            "arm": self.arm,
            "seed": self.seed,
            "short": [point.steps for point in self.own],
            "long": self.long,
            "measured": [round(point.value, 4) for point in self.own],
            "expected": round(found.value, 4),
            "interval": [round(found.low, 4), round(found.high, 4)],
            "truth": round(self.truth, 4),
            "held": self.score() <= 1,
        }


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
    """By setting and text the standard deviation between seeds of gains over cross-entropy of the same seed, pooled over arms and lengths."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for (*setting, seed, arm), outcomes in runs.items():
        reference = runs.get((*setting, seed, "ce"), {})
        for steps in outcomes.keys() & reference.keys() if arm != "ce" else ():
            groups[(*setting, arm, steps)].append(reference[steps] - outcomes[steps])
    squares: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for (*setting, _, _), values in groups.items():
        if len(values) > 1:
            squares[tuple(setting)] += [float(np.var(values, ddof=1))] * (len(values) - 1)
    return {setting: float(np.sqrt(np.mean(found))) for setting, found in squares.items()}


def cases(runs: Runs) -> Iterator[Case]:
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
                yield Case(
                    setting=tuple(setting),
                    arm=json.loads(arm)["name"],
                    seed=seed,
                    long=end,
                    curve=[Point(steps, reference[steps], error) for steps in short],
                    gains=[[Point(s, reference[s] - own[s], error) for s in short if s in own] for own in others],
                    own=[Point(s, reference[s] - outcomes[s], error) for s in short],
                    error=error,
                    truth=reference[end] - outcomes[end],
                )


def fitted(found: Sequence[Case]) -> Prior:
    """The constants of GRID under which the truths are likeliest."""
    return max(GRID, key=lambda prior: sum(case.likelihood(prior) for case in found))


def conformal(found: Sequence[Case], prior: Prior) -> float:
    """The factor on half widths that split conformal prediction asks for at LEVEL: infinite where there are too few cases."""
    scores = sorted(case.score(prior) for case in found)
    rank = math.ceil(LEVEL * (len(scores) + 1))
    return scores[rank - 1] if rank <= len(scores) else math.inf


def held(found: Sequence[Case], prior: Prior) -> dict[str, Any]:
    """How many intervals under `prior` hold the truth, and how wide they are in the middle."""
    widths = [found.high - found.low for found in (case.foretold(prior) for case in found)]
    return {"held": sum(case.score(prior) <= 1 for case in found), "width": round(float(np.median(widths)), 4)}


def left_out(found: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Each setting by what the others tell: constants fitted to them, and the pilot's constants with the factor that they ask for."""
    for setting in sorted({case.setting for case in found}, key=str):
        own = [case for case in found if case.setting == setting]
        others = [case for case in found if case.setting != setting]
        factor = conformal(others, PLAIN)
        line: dict[str, Any] = {
            "left_out": [part for part in setting if part is not None],
            "cases": len(own),
            "plain": held(own, PLAIN),
        }
        if others:
            prior = fitted(others)
            line["fitted"] = held(own, prior) | {name: value for name, value in asdict(prior).items() if name != "widened"}
        if math.isfinite(factor):
            line["conformal"] = held(own, replace(PLAIN, widened=factor)) | {"factor": round(factor, 3)}
        yield line


def summary(found: Sequence[Case]) -> dict[str, Any]:
    """Coverage of all cases: of the pilot as it is, without the factor, and of each setting by the others (None: too few of them)."""
    folds, factor = list(left_out(found)), conformal(found, PLAIN)
    sides = sum(bool(np.sign(case.foretold().value) == np.sign(case.truth)) for case in found)
    outside = {way: sum(fold[way]["held"] for fold in folds) if all(way in fold for fold in folds) else None for way in WAYS}
    return {
        "cases": len(found),
        "settings": len(folds),
        **held(found, PRIOR),
        "sign_right": sides,
        "plain": held(found, PLAIN),
        "left_out_held": outside,
        "conformal_factor": round(factor, 3) if math.isfinite(factor) else None,
    }


def main(paths: Sequence[str]) -> None:
    """Prints the cases, the settings that are left out, and a summary."""
    found = list(cases(read(paths)))
    for line in [*(case.told() for case in found), *left_out(found), summary(found)]:
        print(json.dumps(line))


if __name__ == "__main__":
    main(sys.argv[1:])
