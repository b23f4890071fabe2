"""What the pilot's short runs say of the main run: which candidate, with what gain, or better none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot

import numpy as np

from xtoken_core.errors import InputError, RunError
from xtoken_core.evaluation.intervals import Z95, ratio_interval
from xtoken_core.evaluation.outlook import Forecast, Point, forecast, forecast_change, gain_slope
from xtoken_core.report.pilot_words import extent
from xtoken_core.results.evaluation import Evaluation
from xtoken_core.results.pilot import Extent, Gain, Outlook, Pilot, Trial
from xtoken_core.spec import CandidateSpec, DistillationSpec
from xtoken_core.spec.pilot import CE

DRAWN = 12
"""Steps between the last short run and the main run's end at which the expected gain is told."""


def audit(before: Sequence[Evaluation], teachers: Sequence[Evaluation]) -> list[str]:
    """A line for each teacher and held-out corpus on which it is no better than the student before.

    Raises InputError for a single held-out document, which leaves the noise unknown.
    """
    student = before[0].bits_per_byte
    if student is None or len(student.documents.bits) < 2:
        raise InputError("pilot: needs two held-out documents or more (evaluation.texts), since one leaves the noise unknown")
    lines = []
    for teacher in teachers:
        measured = teacher.bits_per_byte
        if measured is None:
            continue
        pairs = {name: (measured.per_corpus[name].total, bits.total) for name, bits in student.per_corpus.items()}
        worse = {name: (its, own) for name, (its, own) in pairs.items() if its is not None and own is not None and its >= own}
        told = ", ".join(f"{name} ({its:.3f} against {own:.3f})" for name, (its, own) in worse.items())
        if worse:
            lines.append(f"Teacher {teacher.subject.teacher} is no better than the student in bits per byte of {told}.")
    return lines


@dataclass(frozen=True)
class _Known:
    """What the outlook of every candidate rests on."""

    steps: int
    """Of the main run."""
    reference: Mapping[int, Trial]
    """Cross-entropy only, by rung."""
    gains: Mapping[str, list[Gain]]
    """Of each candidate, in the order of the rungs."""

    @property
    def curve(self) -> list[Point]:
        """Bits per byte of cross-entropy only, as uncertain as the gains over it are."""
        noise = max((_error(gain) for own in self.gains.values() for gain in own), default=0.0)
        return [Point(trial.steps, trial.bits_per_byte or 0.0, noise) for trial in self.reference.values()]

    @property
    def slope(self) -> float:
        """How much gains change by a doubling of the steps."""
        return gain_slope(self.curve, [_points(own) for own in self.gains.values()])


def judge(spec: DistillationSpec, trials: Sequence[Trial], rows: int, audited: Sequence[str] = ()) -> Pilot:
    """The verdict of a spec's pilot. `rows`: of the training data. Raises RunError where cross-entropy has no outcome to compare with."""
    assert spec.pilot is not None
    reference = {trial.rung: trial for trial in trials if trial.candidate == CE}
    if failed := [trial.failed for trial in reference.values() if trial.bits_per_byte is None]:
        raise RunError(f"pilot: cross-entropy only has no outcome to compare with: {failed[0]}")
    runs = {c.name: [trial for trial in trials if trial.candidate == c.name] for c in spec.pilot.candidates}
    gains = {name: [_gain(reference[t.rung], t) for t in own if t.bits_per_byte is not None] for name, own in runs.items()}
    known = _Known(spec.training.steps(rows), reference, gains)
    outlooks = [_outlook(spec, candidate, runs[candidate.name], known) for candidate in spec.pilot.candidates]
    outlooks.sort(key=lambda found: (-len(found.measured), -found.expected.value if found.expected else 0.0))
    enough = rows >= known.steps * spec.training.global_batch_size * (outlooks[0].cost or 1.0)
    choice = _choice(outlooks[0], enough)
    return Pilot(
        steps=known.steps,
        chosen=choice.candidate,
        reason=choice.reason,
        next=choice.next if spec.ends_with_pilot else "",
        enough_text=enough,
        outlooks=outlooks,
        trials=[trial for trial in trials if trial.candidate],
        audit=list(audited),
    )


def _outlook(spec: DistillationSpec, candidate: CandidateSpec, runs: Sequence[Trial], known: _Known) -> Outlook:
    """What is expected of one candidate."""
    measured, told = known.gains[candidate.name], {"candidate": candidate.name, "changes": list(candidate.set)}
    told["teachers"] = list(candidate.teachers or (teacher.id for teacher in spec.teachers))
    if not measured:
        return Outlook(**told, failed=next((trial.failed for trial in runs if trial.failed), "was not run"))
    points, last = _points(measured), max(runs, key=lambda trial: trial.rung if trial.seconds_per_step else 0)
    error = points[-1].error
    expected = forecast(points, known.steps, known.slope, error)
    alone = known.reference[last.rung].seconds_per_step
    cost = last.seconds_per_step / alone if alone and last.seconds_per_step else None
    course = np.geomspace(points[-1].steps, max(known.steps, points[-1].steps), DRAWN)
    return Outlook(
        **told,
        measured=measured,
        expected=_as_gain(expected, known.steps),
        same_time=None if cost is None else _same_time(expected, known, max(cost, 1.0)),
        cost=cost,
        course=[_as_gain(forecast(points, steps, known.slope, error), round(steps)) for steps in course.tolist()],
    )


def _same_time(expected: Forecast, known: _Known, cost: float) -> Extent:
    """The gain over cross-entropy that goes on for `cost` times the steps."""
    more = forecast_change(known.curve, known.steps, known.steps * cost)
    return _extent(Forecast(expected.value + more.value, hypot(expected.error, more.error)))


@dataclass(frozen=True)
class _Choice:
    candidate: str
    """The one to run, `ce` for none."""
    reason: str
    next: str
    """What to do now, where nothing follows the pilot."""


def _choice(best: Outlook, enough_text: bool) -> _Choice:
    gain, other = best.expected, best.same_time
    if gain is None:
        return _Choice(
            CE,
            f"Do not distil: no candidate has an outcome ({best.candidate}: {best.failed}).",
            "mend what made them fail, or train on cross-entropy only, as --set pilot.then=best does.",
        )
    ahead = f"{extent(gain)} bits per byte ahead of cross-entropy only"
    if gain.value <= 0:
        return _Choice(
            CE,
            f"Do not distil: no candidate is expected to be ahead; the best, {best.candidate}, {extent(gain)} bits per byte.",
            "train on cross-entropy only, as --set pilot.then=best does, or try other candidates: teachers, modes, a smaller share of KD.",
        )
    if gain.low <= 0:
        return _Choice(
            CE,
            f"Do not distil: {best.candidate} is expected {ahead} after {gain.steps:,} steps, which is not told apart from nothing.",
            "a larger pilot.budget or more held-out text (evaluation.texts) narrows the interval; without, train on cross-entropy only, "
            "as --set pilot.then=best does.",
        )
    if enough_text and other is not None and other.value <= 0:
        return _Choice(
            CE,
            f"Do not distil: {best.candidate} is expected {ahead} after {gain.steps:,} steps, but each takes {best.cost:.1f} times as long. "
            f"Cross-entropy given that time is expected ahead, by {extent(other, -1)}, and there is text for it.",
            f"train on cross-entropy only for {gain.steps * (best.cost or 1):,.0f} steps; or, where text is dearer than time, distil all the same.",
        )
    return _Choice(
        best.candidate,
        f"Distil as {best.candidate}: {ahead} are expected after {gain.steps:,} steps.",
        f"the same command with --set pilot.then=best; the main run follows as {best.candidate}, and the short runs come from the cache.",
    )


def _gain(reference: Trial, trial: Trial) -> Gain:
    """Of a trial over cross-entropy of as many steps, paired over blocks of documents."""
    size = np.array(trial.blocks.bytes, dtype=float)
    ahead = np.subtract(reference.blocks.bits, trial.blocks.bits)
    low, high = ratio_interval(ahead, size)
    return Gain(steps=trial.steps, value=float(ahead.sum() / size.sum()), low=low, high=high)


def _error(gain: Extent) -> float:
    return (gain.high - gain.low) / (2 * Z95)


def _points(gains: Sequence[Gain]) -> list[Point]:
    return [Point(gain.steps, gain.value, _error(gain)) for gain in gains]


def _extent(found: Forecast) -> Extent:
    return Extent(value=found.value, low=found.low, high=found.high)


def _as_gain(found: Forecast, steps: int) -> Gain:
    return Gain(steps=steps, **_extent(found).model_dump())
