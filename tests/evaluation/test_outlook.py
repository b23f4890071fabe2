"""Forecasts of gains: exact where nothing is uncertain, and intervals that hold the truth of simulated power laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import examples
from xtoken_core.evaluation.outlook import PRIOR, Point, forecast, forecast_change, gain_slope, slopes

STEPS = (10, 20, 40)


def points(value, error=0.0):
    return [Point(steps, value(steps), error) for steps in STEPS]


def test_a_curve_goes_through_its_points_and_levels_off_far_ahead():
    line = points(lambda steps: 0.01 * np.log2(steps / 10))
    assert forecast(line, 20, slope=0.01).value == pytest.approx(0.01, abs=1e-6)
    near, far, further = (forecast(line, steps, slope=0.01) for steps in (80, 10**6, 10**9))
    assert 0.02 < near.value < 0.0301
    assert far.value < 0.02 + 0.01 * np.log2(10**6 / 40) / 3 and further.value == pytest.approx(far.value, rel=0.1)
    assert near.error < far.error < further.error


def test_a_single_run_is_its_own_forecast_less_certain_with_the_distance():
    found = [forecast([Point(10, 0.004, 0.001)], steps, slope=0.002) for steps in (10, 20, 80)]
    assert [f.value for f in found] == pytest.approx([0.004] * 3, abs=1e-6)
    assert found[0].error == pytest.approx(PRIOR.widened * 0.001, rel=1e-3) and found[0].error < found[1].error < found[2].error


def test_a_change_is_known_better_than_its_ends():
    curve = points(lambda steps: 1 - 0.02 * np.log2(steps), error=0.001)
    change = forecast_change(curve, 80, 160)
    assert -0.02 < change.value < -0.013
    assert change.error < forecast_change(curve, 80, 320).error < 0.02
    assert forecast_change(curve, 80, 80).error == pytest.approx(0, abs=1e-5)


def test_the_slope_of_gains_is_that_of_the_candidates_and_before_any_is_seen_a_share_of_cross_entropys():
    reference = points(lambda steps: -0.1 * np.log2(steps))
    assert slopes(reference) == pytest.approx([-0.1, -0.1])
    assert gain_slope(reference, [[Point(10, 1.0, 0.0)]]) == pytest.approx(PRIOR.trust**0.5 * PRIOR.share * 0.1)
    steep = [points(lambda steps: np.log2(steps))] * 5
    expected = np.sqrt((PRIOR.trust * (PRIOR.share * 0.1) ** 2 + 10) / (PRIOR.trust + 8))
    assert gain_slope(reference, steep) == pytest.approx(expected)


@examples(30)
@given(st.integers(2, 200), st.integers(0, 10**6), st.sampled_from([0.0003, 0.001, 0.003]), st.integers(2, 12))
def test_intervals_hold_the_truth_of_power_laws_in_nine_of_ten_cases(first, seed, noise, ratio):
    """Cross-entropy and three candidates, each a power law with an exponent of its own, measured with noise; at least 90 % over 40 draws."""
    rng = np.random.default_rng(seed)
    lengths, held = [first, 2 * first, 4 * first], []
    for _ in range(40):
        exponent, scale = rng.uniform(0.1, 0.8), rng.uniform(0.05, 1)
        reference = [Point(n, scale * n**-exponent + rng.normal(0, noise), noise) for n in lengths]
        laws = [(scale * rng.uniform(0.8, 1.2), exponent * rng.uniform(0.8, 1.2), rng.normal(0, 0.01)) for _ in range(3)]
        gains = [
            [Point(p.steps, p.value - s * p.steps**-e - level + rng.normal(0, noise), 2**0.5 * noise) for p in reference]
            for s, e, level in laws
        ]
        end = 4 * first * ratio
        scale_of_candidate, its_exponent, level = laws[0]
        truth = scale * end**-exponent - scale_of_candidate * end**-its_exponent - level + rng.normal(0, 2**0.5 * noise)
        found = forecast(gains[0], end, gain_slope(reference, gains), 2**0.5 * noise)
        held.append(found.low <= truth <= found.high)
    assert sum(held) >= 36
