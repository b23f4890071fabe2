"""Did it help? Differences between evaluations with intervals, and what they mean in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xtoken_core.evaluation.intervals import Estimate, difference_interval, ratio_interval
from xtoken_core.report.pilot_words import pilot_sentences
from xtoken_core.report.run import Run
from xtoken_core.results.evaluation import Bits, Documents, Evaluation, TaskScore
from xtoken_core.results.pilot import Pilot
from xtoken_core.results.subject import BEFORE, BEST, LAST, TWIN_BEST, TWIN_LAST, Subject, teacher_subject
from xtoken_core.spec.pilot import CE

LABELS = {
    BEFORE: "student before",
    BEST: "student after, best",
    LAST: "student after, last",
    TWIN_BEST: "CE twin, best",
    TWIN_LAST: "CE twin, last",
}
"""Names for people of the student's states, in the order of tables; teachers follow."""

OVERFIT = 0.02
"""Share of its score that the last checkpoint must lose to the best one for a word on overfitting."""


def label(subject: Subject) -> str:
    """The name of an evaluated model for people."""
    return LABELS.get(subject) or f"teacher {subject.teacher}"


def everybody(run: Run) -> list[Evaluation]:
    """All evaluations, in the order of tables: of the student's states, its twin's, the teachers in the spec's order."""
    order = [*LABELS, *map(teacher_subject, run.teachers)]
    return [result for subject in order if (result := run.result(subject))]


@dataclass(frozen=True)
class Difference:
    """How far one evaluation is from another, `value` = of - against, with a 95 % interval (infinite where the noise is unknown)."""

    of: Subject
    against: Subject
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


def bits_per_byte(result: Evaluation | None) -> float | None:
    """The total of an evaluation, None where it wasn't measured."""
    return result.bits_per_byte.total if result and result.bits_per_byte else None


def bits_limits(measured: Bits) -> str:
    """The interval of bits per byte in words."""
    if measured.low is None or measured.high is None:
        return "one document: none"
    return f"{measured.low:.3f} to {measured.high:.3f}"


def _documents(result: Evaluation | None) -> Documents:
    return result.bits_per_byte.documents if result and result.bits_per_byte else Documents()


def same_documents(a: Evaluation | None, b: Evaluation | None) -> bool:
    """Whether two evaluations measured bits per byte on the same documents, as far as their sizes tell."""
    return _documents(a).bytes == _documents(b).bytes


def bits_difference(of: Evaluation | None, against: Evaluation | None) -> Difference | None:
    """Difference in bits per byte of two evaluations; None unless both were measured.

    On the same held-out documents the interval is a paired one, over documents (see `ratio_interval`); otherwise that of
    independent estimates.
    """
    if not (of and against and of.bits_per_byte and against.bits_per_byte):
        return None
    a, b = of.bits_per_byte, against.bits_per_byte
    if a.total is None or b.total is None:
        return None
    paired = len(a.documents.bits) >= 2 and same_documents(of, against)
    if paired:
        low, high = ratio_interval(np.subtract(a.documents.bits, b.documents.bits), np.array(a.documents.bytes))
    else:
        low, high = difference_interval(_estimate(a.total, a), _estimate(b.total, b))
    return Difference(of.subject, against.subject, a.total - b.total, low, high, paired=paired)


def task_difference(task: str, of: Evaluation | None, against: Evaluation | None) -> Difference | None:
    """Difference in a benchmark's score of two evaluations; None unless both have it."""
    if not (of and against):
        return None
    return score_difference(of.subject, against.subject, of.tasks.get(task), against.tasks.get(task))


def score_difference(of: Subject, against: Subject, a: TaskScore | None, b: TaskScore | None) -> Difference | None:
    """Difference of two entries of a benchmark; None unless both are there.

    Paired over the questions where every answer is right or wrong; otherwise that of independent estimates.
    """
    if not a or not b or a.value is None or b.value is None:
        return None
    paired = bool(a.scores) and a.questions == b.questions
    correlation = _correlation(a.scores, b.scores) if paired else 0.0
    low, high = difference_interval(_estimate(a.value, a), _estimate(b.value, b), correlation)
    lower_is_better = not a.higher_is_better
    return Difference(of, against, a.value - b.value, low, high, lower_is_better, paired)


def _correlation(a: str, b: str) -> float:
    """Of right answers, as "0110"; 0 where one has all right or all wrong."""
    x, y = (np.array(list(scores), dtype=float) for scores in (a, b))
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0


def _estimate(value: float, measured: Bits | TaskScore) -> Estimate:
    """With the ends of its interval, infinite where none was measured, as for a single document."""
    if measured.low is None or measured.high is None:
        return value, -math.inf, math.inf
    return value, measured.low, measured.high


@dataclass(frozen=True)
class Verdict:
    """The answer to "did it help?"."""

    tone: str
    """`good`, `mixed`, `bad`, `even` (no difference beyond the noise) or `unknown` (nothing to compare)."""
    headline: str
    sentences: list[str]

    def __str__(self) -> str:
        return "\n".join([self.headline, *self.sentences])


def pilot_verdict(pilot: Pilot) -> Verdict:
    """What a pilot says of the main run, headline first."""
    best = pilot.outlooks[0]
    tone = "good" if pilot.chosen != CE else "bad" if best.expected and best.expected.high < 0 else "even"
    return Verdict(tone, pilot.reason, list(pilot_sentences(pilot)))


def verdict(run: Run) -> Verdict:
    """What the run's evaluations say, headline first; of a pilot that nothing has followed, what that says."""
    if run.pilot is not None and run.summary is None:
        return pilot_verdict(run.pilot)
    before, best, last, after = run.result(BEFORE), run.result(BEST), run.result(LAST), run.after
    gain = bits_difference(after, before)
    if gain is None:
        sentences = [*_on_tasks(after, before)]
        return Verdict("unknown", "Held-out bits per byte of the student before and after were not both measured.", sentences)
    a, b = bits_per_byte(after) or 0.0, bits_per_byte(before) or 0.0
    percent = 100 * (a - b) / b
    change = f"from {b:.3f} to {a:.3f} bits per byte on held-out text ({percent:+.{0 if abs(percent) >= 1 else 1}f} %)"
    against_twin = twin_differences(run)
    taught = "Distillation" if run.pilot is None or run.pilot.chosen != CE else "Cross-entropy only, as the pilot chose,"
    helped = {
        "bad": "The student improved, but cross-entropy alone does better",
        "even": "The student improved, but cross-entropy alone does as well",
    }.get(against_twin[0].tone if against_twin else "", f"{taught} helped")
    answer = {
        "good": f"{helped}: {change}.",
        "bad": f"{taught} made the student worse: {change}.",
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
        *_on_tasks(after, before),
        *([f"The pilot had said: {run.pilot.reason}"] if run.pilot else []),
    ]
    tone = gain.tone
    if tone == "good" and any(d.tone != "good" for d in against_twin):
        tone = "mixed"
    return Verdict(tone, answer, sentences)


def interval(difference: Difference) -> str:
    """`-0.123 [-0.150, -0.090]`, or `-0.123 (noise unknown)`."""
    limits = f"[{difference.low:+.3f}, {difference.high:+.3f}]" if math.isfinite(difference.low) else "(noise unknown)"
    return f"{difference.value:+.3f} {limits}"


def twin_differences(run: Run) -> list[Difference]:
    """Student against twin, best against best and last against last, as far as they were measured; once where these are the same."""
    pairs = ((BEST, TWIN_BEST), (LAST, TWIN_LAST))
    found = [d for student, twin in pairs if (d := bits_difference(run.result(student), run.result(twin)))]
    return found[:1] if _last_is_best(run) else found


def _last_is_best(run: Run) -> bool:
    """Whether the last checkpoint is the best one, the student's and the twin's."""
    pairs = [(run.result(best), run.result(last)) for best, last in ((BEST, LAST), (TWIN_BEST, TWIN_LAST))]
    return all(best and last and best.bits_per_byte == last.bits_per_byte for best, last in pairs)


def _on_checkpoints(best: Evaluation | None, last: Evaluation | None) -> Iterator[str]:
    difference = bits_difference(last, best)
    if difference and difference.tone == "bad" and difference.value > OVERFIT * (bits_per_byte(best) or 0):
        yield (
            f"The last checkpoint ({bits_per_byte(last):.3f}) is worse than the best one on validation "
            f"({bits_per_byte(best):.3f}): the student overfits towards the end."
        )


def _on_twin(run: Run, differences: list[Difference]) -> Iterator[str]:
    words = {"good": "ahead of", "bad": "behind", "even": "not told apart from"}
    also = ", which is the last one," if _last_is_best(run) else ""
    for difference in differences:
        yield (
            f"At its {difference.of.state} checkpoint{also} the student is {words[difference.tone]} its twin trained on cross-entropy alone "
            f"({bits_per_byte(run.result(difference.against)):.3f}): {interval(difference)}."
        )
    if not differences:
        yield "Whether plain cross-entropy training would have done as well was not measured (evaluation.ce_baseline)."


def _on_teachers(run: Run, before: float, after: float) -> Iterator[str]:
    scores = {t: score for t in run.teachers if (score := bits_per_byte(run.result(teacher_subject(t)))) is not None}
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


def _on_tasks(after: Evaluation | None, before: Evaluation | None) -> Iterator[str]:
    tones = [d.tone for task in (after.tasks if after else ()) if (d := task_difference(task, after, before))]
    if tones:
        yield (
            f"Of {len(tones)} benchmarks {tones.count('good')} improved beyond the noise, {tones.count('bad')} got worse, "
            f"{tones.count('even')} cannot be told apart."
        )
