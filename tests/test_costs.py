"""The model of a step's time, held to every step that was measured."""

from __future__ import annotations

import pytest

from tests.benchmarks.scale import MEASURED
from xtoken_core.costs import ModelSize, StepShape, gradient_seconds, step_seconds


@pytest.mark.parametrize("step", MEASURED, ids=lambda step: step.name)
def test_the_model_is_within_a_tenth_of_what_was_measured(step):
    assert step.modelled() == pytest.approx(step.seconds, rel=0.1)


@pytest.mark.parametrize("step", [s for s in MEASURED if s.peak_gib is not None], ids=lambda step: step.name)
def test_so_is_the_memory(step):
    assert step.modelled_gib() == pytest.approx(step.peak_gib, rel=0.1)


def test_what_a_step_grows_with():
    student, teacher = ModelSize(10**9, 10**9, 16, 2048, 128_256), ModelSize(4 * 10**9, 4 * 10**9, 32, 3072, 128_256)

    def total(**changes):
        return step_seconds(student, [teacher], StepShape(**{"rows": 24, "length": 2048, "compiled": True} | changes)).total

    assert total(rows=48) == pytest.approx(2 * total())
    assert total(micro_batch=4) < total() < total(recomputed=True) and total(fp8=(True,)) < total() < total(compiled=False)
    assert total(trained=10**7) < total() and teacher.forward_flops(4096, 4096) > teacher.forward_flops(4096, 2048)


def test_gradients_cross_hosts_by_all_gpus_of_a_host():
    assert gradient_seconds(4e9, 1) == 0 and gradient_seconds(4e9, 2) == pytest.approx(4e9 / 355e9)
    assert gradient_seconds(4e9, 1024) == pytest.approx(2 * 7 / 8 * 4e9 / 355e9 + 2 * 0.5e9 / 50e9)
