"""Did it help? Differences between evaluations with intervals, and what they mean in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from xtoken_core.evaluation.intervals import Estimate, difference_interval, ratio_interval
from xtoken_core.report.run import Run

WHO = {
    "student_before": "student before",
    "student_after_best": "student after, best",
    "student_after_last": "student after, last",
    "baseline_best": "CE twin, best",
    "baseline_last": "CE twin, last",
}
"""Names for people of everybody who is evaluated, in the order of tables; teachers follow. Best: the checkpoint with the best
validation. CE twin: the same student trained on cross-entropy alone, with the same rows and steps."""

OVERFIT = 0.02
"""Share of its score that the last checkpoint must lose to the best one for a word on overfitting."""


def label(who: str) -> str:
    """The name of an evaluated model for people."""
    return WHO.get(who) or who.replace("teacher-", "teacher ", 1)


def everybody(run: Run) -> list[str]:
    """Who was evaluated, in the order of tables: the student's states, its twin's, the teachers in the spec's order."""
    order = [*WHO, *(f"teacher-{teacher}" for teacher in run.teachers)]
    return [who for who in order if run.result(who)]


@dataclass(frozen=True)
class Difference:
    """How far one evaluation is from another, `value` = of - against, with a 95 % interval (infinite where the noise is unknown)."""

    of: str
    against: str
    value: float
    low: float
    high: float
    lower_is_better: bool = True
    paired: bool = False
    """Whether both were measured on the same documents and compared document by document."""

    @property
    def exceeds_noise(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    @property
    def tone(self) -> str:
        """`good`, `bad`, or `even` where the difference is within the noise."""
        if not self.exceeds_noise:
            return "even"
        return "good" if (self.value < 0) == self.lower_is_better else "bad"


def bits_per_byte(result: dict[str, Any]) -> float | None:
    """The total of an evaluation, None where it wasn't measured."""
    return (result.get("bits_per_byte") or {}).get("total")


def bits_limits(measured: dict[str, Any]) -> str:
    """The interval of bits per byte in words."""
    if measured.get("low") is None:
        return "one document: none"
    return f"{measured['low']:.3f} to {measured['high']:.3f}"


def _documents(result: dict[str, Any]) -> dict[str, Any]:
    """Corpus, bits and bytes of each held-out document of an evaluation."""
    return (result.get("bits_per_byte") or {}).get("documents") or {}


def same_documents(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two evaluations measured bits per byte on the same documents, as far as their sizes tell."""
    return bool(_documents(a).get("bytes") == _documents(b).get("bytes"))


def bits_difference(of: dict[str, Any], against: dict[str, Any]) -> Difference | None:
    """Difference in bits per byte of two evaluations; None unless both were measured.

    On the same held-out documents the interval is a paired one, over documents (see `ratio_interval`); otherwise that of
    independent estimates.
    """
    a, b = bits_per_byte(of), bits_per_byte(against)
    if a is None or b is None:
        return None
    documents_a, documents_b = _documents(of), _documents(against)
    paired = len(documents_a.get("bits", [])) >= 2 and same_documents(of, against)
    if paired:
        low, high = ratio_interval(np.subtract(documents_a["bits"], documents_b["bits"]), documents_a["bytes"])
    else:
        low, high = difference_interval(_estimate(a, of["bits_per_byte"]), _estimate(b, against["bits_per_byte"]))
    return Difference(of["who"], against["who"], a - b, low, high, paired=paired)


def task_difference(task: str, of: dict[str, Any], against: dict[str, Any]) -> Difference | None:
    """Difference in a benchmark's score of two evaluations; None unless both have it."""
    entries = (result.get("tasks", {}).get(task) for result in (of, against))
    return score_difference(of["who"], against["who"], *entries) if of and against else None


def score_difference(of: str, against: str, a: dict[str, Any] | None, b: dict[str, Any] | None) -> Difference | None:
    """Difference of two entries of a benchmark; None unless both are there.

    Paired over the questions where every answer is right or wrong; otherwise that of independent estimates.
    """
    if not a or not b:
        return None
    paired = bool(a.get("scores")) and a["questions"] == b.get("questions")
    correlation = _correlation(a["scores"], b["scores"]) if paired else 0.0
    low, high = difference_interval(_estimate(a["value"], a), _estimate(b["value"], b), correlation)
    lower_is_better = not a.get("higher_is_better", True)
    return Difference(of, against, a["value"] - b["value"], low, high, lower_is_better, paired)


def _correlation(a: str, b: str) -> float:
    """Of right answers, as "0110"; 0 where one has all right or all wrong."""
    x, y = (np.array(list(scores), dtype=float) for scores in (a, b))
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0


def _estimate(value: float, measured: dict[str, Any]) -> Estimate:
    """With the ends of its interval, infinite where none was measured, as for a single document."""
    if measured.get("low") is None or measured.get("high") is None:
        return value, -math.inf, math.inf
    return value, measured["low"], measured["high"]


@dataclass(frozen=True)
class Verdict:
    """The answer to "did it help?"."""

    tone: str
    """`good`, `mixed`, `bad`, `even` (no difference beyond the noise) or `unknown` (nothing to compare)."""
    headline: str
    sentences: list[str]


def verdict(run: Run) -> Verdict:
    """What the run's evaluations say, headline first."""
    before, best, last = (run.result(f"student_{state}") for state in ("before", "after_best", "after_last"))
    after = best or last
    gain = bits_difference(after, before) if after and before else None
    if gain is None:
        sentences = [*_on_tasks(run, after, before)]
        return Verdict("unknown", "Held-out bits per byte of the student before and after were not both measured.", sentences)
    a, b = bits_per_byte(after) or 0.0, bits_per_byte(before) or 0.0
    change = f"from {b:.3f} to {a:.3f} bits per byte on held-out text ({100 * (a - b) / b:+.0f} %)"
    against_twin = [d for d in _twin_differences(run) if d is not None]
    helped = {
        "bad": "The student improved, but cross-entropy alone does better",
        "even": "The student improved, but cross-entropy alone does as well",
    }.get(against_twin[0].tone if against_twin else "", "Distillation helped")
    answer = {
        "good": f"{helped}: {change}.",
        "bad": f"Distillation made the student worse: {change}.",
        "even": f"No difference beyond the noise: {change}."
        if math.isfinite(gain.low)
        else f"One document says little: {change}, noise unknown.",
    }[gain.tone]
    sentences = [
        f"95 % interval of the change: {interval(gain)} bits per byte."
        if math.isfinite(gain.low)
        else "Only more held-out documents (evaluation.texts) would give intervals, and tell a difference from the noise.",
        *_on_checkpoints(best, last),
        *_on_twin(run, against_twin),
        *_on_teachers(run, b, a),
        *_on_tasks(run, after, before),
    ]
    tone = gain.tone
    if tone == "good" and any(d.tone != "good" for d in against_twin):
        tone = "mixed"
    return Verdict(tone, answer, sentences)


def interval(difference: Difference) -> str:
    """`-0.123 [-0.150, -0.090]`, or `-0.123 (noise unknown)`."""
    limits = f"[{difference.low:+.3f}, {difference.high:+.3f}]" if math.isfinite(difference.low) else "(noise unknown)"
    return f"{difference.value:+.3f} {limits}"


def _twin_differences(run: Run) -> list[Difference | None]:
    """Student against twin, best against best and last against last."""
    return [
        bits_difference(run.result(f"student_after_{state}"), run.result(f"baseline_{state}"))
        if run.result(f"student_after_{state}") and run.result(f"baseline_{state}")
        else None
        for state in ("best", "last")
    ]


def _on_checkpoints(best: dict[str, Any], last: dict[str, Any]) -> Iterator[str]:
    difference = bits_difference(last, best) if best and last else None
    if difference and difference.tone == "bad" and difference.value > OVERFIT * (bits_per_byte(best) or 0):
        yield (
            f"The last checkpoint ({bits_per_byte(last):.3f}) is worse than the best one on validation "
            f"({bits_per_byte(best):.3f}): the student overfits towards the end."
        )


def _on_twin(run: Run, differences: list[Difference]) -> Iterator[str]:
    words = {"good": "ahead of", "bad": "behind", "even": "not told apart from"}
    for difference in differences:
        state = difference.of.rpartition("_")[2]
        yield (
            f"At its {state} checkpoint the student is {words[difference.tone]} its twin trained on cross-entropy alone "
            f"({bits_per_byte(run.result(difference.against)):.3f}): {interval(difference)}."
        )
    if not differences:
        yield "Whether plain cross-entropy training would have done as well was not measured (evaluation.ce_baseline)."


def _on_teachers(run: Run, before: float, after: float) -> Iterator[str]:
    scores = {t: score for t in run.teachers if (score := bits_per_byte(run.result(f"teacher-{t}"))) is not None}
    if not scores:
        return
    best = min(scores, key=lambda teacher: scores[teacher])
    if before <= scores[best]:
        yield f"The best teacher, {best}, stands at {scores[best]:.3f}: no better than the student was before."
    elif after <= scores[best]:
        yield f"The student now beats the best teacher, {best} ({scores[best]:.3f})."
    else:
        closed = (before - after) / (before - scores[best])
        yield f"The best teacher, {best}, stands at {scores[best]:.3f}: {100 * closed:.0f} % of the gap to it is closed."


def _on_tasks(run: Run, after: dict[str, Any], before: dict[str, Any]) -> Iterator[str]:
    tones = [d.tone for task in after.get("tasks", {}) if (d := task_difference(task, after, before))]
    if tones:
        yield (
            f"Of {len(tones)} benchmarks {tones.count('good')} improved beyond the noise, {tones.count('bad')} got worse, "
            f"{tones.count('even')} cannot be told apart."
        )
