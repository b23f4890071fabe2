"""What a pilot says of the main run, in words."""

from __future__ import annotations

from collections.abc import Iterator

from xtoken_core.results.pilot import Extent, Outlook, Pilot
from xtoken_core.spec.pilot import CE


def extent(found: Extent, sign: int = 1) -> str:
    """`+0.0123 [+0.0050, +0.0196]`; with sign -1 that of the negated figure."""
    low, high = (found.low, found.high) if sign > 0 else (-found.high, -found.low)
    return f"{sign * found.value:+.4f} [{low:+.4f}, {high:+.4f}]"


def pilot_sentences(pilot: Pilot) -> Iterator[str]:
    """What follows the headline: what to do, then what it rests on."""
    best = pilot.outlooks[0]
    if pilot.next:
        yield f"Next: {pilot.next}"
    yield from (*_on_best(pilot, best), *_on_others(pilot), *pilot.audit, *_on_runs(pilot))


def _on_best(pilot: Pilot, best: Outlook) -> Iterator[str]:
    settings = f", {', '.join(best.changes)}" if best.changes else ""
    yield f"{best.candidate}: teachers {', '.join(best.teachers)}{settings}."
    if best.same_time and best.cost:
        gain = best.same_time
        lasts = "" if pilot.enough_text else ", for which the text does not last without repeats"
        words = "still ahead" if gain.low > 0 else "behind" if gain.high < 0 else "not told apart"
        yield (
            f"In the same GPU time cross-entropy takes {best.cost:.1f} times the steps{lasts}; against that {best.candidate} is {words}: "
            f"{extent(gain)} bits per byte."
        )


def _on_runs(pilot: Pilot) -> Iterator[str]:
    lengths = sorted({trial.steps for trial in pilot.trials})
    told = f"{len(pilot.trials)} short runs of {', '.join(f'{steps:,}' for steps in lengths)} steps, each with a whole schedule"
    longest = max((trial for trial in pilot.trials if trial.candidate == CE), key=lambda trial: trial.steps, default=None)
    reached = (
        f"; the longest on cross-entropy only came to {longest.bits_per_byte:.3f}" if longest and longest.bits_per_byte else ""
    )
    yield f"It rests on {told}{reached}. Brackets hold 95 % intervals."


def _on_others(pilot: Pilot) -> Iterator[str]:
    for other in pilot.outlooks[1:]:
        if other.expected:
            yield f"{other.candidate}: {extent(other.expected)}, from runs of up to {other.measured[-1].steps:,} steps."
        else:
            yield f"{other.candidate}: no outcome: {other.failed}"
