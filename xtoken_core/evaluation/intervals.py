"""95 % intervals: of ratios over documents, of shares, of differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
Z95 = 1.96


def ratio_interval(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 95 % interval of sum(numerators) / sum(denominators) over resampled documents (percentile bootstrap, fixed seed).

    Bits over bytes give that of bits per byte. Differences of two models' bits over bytes give that of a paired difference (Koehn,
    2004, "Statistical significance tests for machine translation evaluation"): what makes a text hard is common to both and cancels.
    """
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(above), size=len(above)) for _ in range(RESAMPLES))
    low, high = np.quantile([above[draw].sum() / below[draw].sum() for draw in draws], [0.025, 0.975])
    return float(low), float(high)


def share_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in `count` trials (Wilson, 1927, "Probable inference, the law of succession").

    Unlike share +- 1.96 standard errors it does not shrink to a point where all trials came out alike.
    """
    z = Z95**2 / count
    middle, half = share + z / 2, math.sqrt(z * (share * (1 - share) + z / 4))
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


Estimate = tuple[float, float, float]
"""A value and the ends of its interval."""


def difference_interval(a: Estimate, b: Estimate, correlation: float = 0.0) -> tuple[float, float]:
    """The interval of a - b, on each side from the distances to the ends that move the difference there.

    Newcombe, 1998: "Interval estimation for the difference between independent proportions" and "Improved confidence intervals for
    the difference between binomial proportions based on paired data", of both the tenth method. `correlation`: of the trials that
    the two have in common.
    """
    (x, low_x, high_x), (y, low_y, high_y) = a, b

    def joined(p: float, q: float) -> float:
        return math.inf if math.isinf(p) or math.isinf(q) else math.sqrt(max(0.0, p * p - 2 * correlation * p * q + q * q))

    return x - y - joined(x - low_x, high_y - y), x - y + joined(high_x - x, y - low_y)
