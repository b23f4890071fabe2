"""Where a curve will be: the value of a training's outcome at more steps than were run, with an interval.

Outcomes are those of separate trainings, each with its whole schedule. Their curve over the logarithm of the steps is taken for a
level plus a slope that wanders: a stationary Ornstein-Uhlenbeck process around zero. Far ahead the slope is forgotten, the mean
bends to level, and the variance grows with the distance. The process is Gaussian, so that the forecast is a regression with this
covariance (Rasmussen and Williams, 2006, "Gaussian Processes for Machine Learning", section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xtoken_core.evaluation.intervals import Z95

CURVE_MEMORY, CURVE_SHARE = 10.0, 0.5
"""Doublings of the steps over which the slope of a curve of bits per byte is remembered (to 1/e), and its standard deviation, as a share of
the slope that was seen."""


@dataclass(frozen=True)
class Prior:
    """What is taken of gains before any is seen."""

    share: float = 0.3
    """Of what cross-entropy gains with a doubling of the steps, by which gains change with it."""
    trust: float = 3.0
    """That counts like so many sightings."""
    memory: float = 3.0
    """Doublings over which the slope of a gain is remembered (to 1/e)."""
    widened: float = 1.32
    """Factor on the intervals by which nine of ten hold what was measured: conformal prediction over small and large trainings, computed by
    tests/benchmarks/pilot.py."""


PRIOR = Prior()


@dataclass(frozen=True)
class Point:
    """The outcome of one training."""

    steps: float
    value: float
    error: float
    """Standard error."""


@dataclass(frozen=True)
class Forecast:
    """An expected value and its standard deviation."""

    value: float
    error: float

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - Z95 * self.error

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + Z95 * self.error


def forecast(points: Sequence[Point], steps: float, slope: float, error: float = 0.0, prior: Prior = PRIOR) -> Forecast:
    """The value of one more training, of so many steps.

    slope: standard deviation of the change that a doubling of the steps makes. error: of that training's own measurement.
    """
    found = _conditioned(points, np.array([1.0]), np.array([steps]), slope, prior.memory)
    return Forecast(found.value, prior.widened * float(np.hypot(found.error, error)))


def forecast_change(points: Sequence[Point], start: float, end: float) -> Forecast:
    """How much a curve of bits per byte changes from `start` to `end` steps."""
    slope = CURVE_SHARE * float(np.mean(np.abs(slopes(points) or [0.0])))
    return _conditioned(points, np.array([1.0, -1.0]), np.array([end, start]), slope, CURVE_MEMORY)


def slopes(points: Sequence[Point]) -> list[float]:
    """Changes by a doubling of the steps, between neighbours."""
    ordered = sorted(points, key=lambda point: point.steps)
    return [(b.value - a.value) / float(np.log2(b.steps / a.steps)) for a, b in zip(ordered, ordered[1:]) if b.steps > a.steps]


def gain_slope(reference: Sequence[Point], gains: Sequence[Sequence[Point]], prior: Prior = PRIOR) -> float:
    """The standard deviation of what a doubling of the steps changes in gains over `reference`, from those of all candidates.

    The posterior mean of the variance under a scaled inverse chi-square prior: of few sightings more than their own.
    """
    seen = [slope for points in gains for slope in slopes(points)]
    before = prior.share * float(np.mean(np.abs(slopes(reference) or [0.0])))
    return float(np.sqrt((prior.trust * before**2 + np.square(seen).sum()) / (prior.trust + len(seen) - 2)))


def _conditioned(points: Sequence[Point], weights: np.ndarray, targets: np.ndarray, slope: float, memory: float) -> Forecast:
    """The weighted sum of the curve at `targets` (steps), given the points."""
    known = np.log2([point.steps for point in points])
    values, errors = np.array([[point.value, point.error] for point in points]).T
    origin, slope = known.max(), max(slope, 1e-9)
    here, there = known - origin, np.log2(targets) - origin
    level = 1e4 * (slope**2 + float(np.square(values).max()))  # as good as unknown
    among = level + slope**2 * _wandering(here, here, memory) + np.diag(errors**2 + 1e-9 * slope**2)
    across = level + slope**2 * _wandering(there, here, memory)
    ahead = level + slope**2 * _wandering(there, there, memory)
    gain = np.linalg.solve(among, across.T).T
    variance = weights @ (ahead - gain @ across.T) @ weights
    return Forecast(float(weights @ gain @ values), float(np.sqrt(max(variance, 0.0))))


def _wandering(a: np.ndarray, b: np.ndarray, memory: float) -> np.ndarray:
    """Covariance [A, B] of the integral from 0 of a slope of variance 1 that is forgotten over `memory`."""
    x, y = np.abs(a)[:, None] / memory, np.abs(b)[None, :] / memory
    one_side = 2 * np.minimum(x, y) - 1 + np.exp(-x) + np.exp(-y) - np.exp(-np.abs(x - y))
    across = -(1 - np.exp(-x)) * (1 - np.exp(-y))  # one before the origin, one after it
    return memory**2 * np.where(np.sign(a)[:, None] * np.sign(b)[None, :] < 0, across, one_side)
