"""The published implementation's answers (tests/oracle/README.md) hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.support.losses_cases import oracle_case
from xtoken_core.losses import distillation_loss

CASES = sorted((Path(__file__).parents[1] / "oracle").glob("*.safetensors"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_oracle(path, dtype):
    batch, teachers, spec, expected = oracle_case(path, dtype)
    out = distillation_loss(*batch, teachers, spec)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    error = torch.linalg.vector_norm(batch[0].grad - expected["grad"]) / torch.linalg.vector_norm(expected["grad"])
    assert error < 1e-4
    metrics = {name: value for name, value in expected["metrics"].items() if not name.startswith("proj_accuracy")}
    assert {name: float(out.metrics[name]) for name in metrics} == pytest.approx(metrics, rel=1e-5)


def test_oracle_has_every_case():
    assert len(CASES) == 22
    with safe_open(CASES[0], "pt") as file:
        assert json.loads(file.metadata()["config"])["teachers"]
