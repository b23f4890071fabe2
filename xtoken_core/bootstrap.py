"""Intervals by the bootstrap over documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


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
