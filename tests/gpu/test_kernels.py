"""The loss kernels on a GPU: against the plain path in float64, bitwise on repeat, and on inputs made to be awkward."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: tests/losses/test_kernels_interpreter.py runs the kernels' logic here", allow_module_level=True)

from tests.support import kernel_cases  # noqa: E402
from tests.support.kernel_cases import CASES, Case, build, compare, distance, evaluate  # noqa: E402
from tests.support.losses_cases import oracle_case  # noqa: E402
from xtoken_core.losses import distillation_loss, plain  # noqa: E402
from xtoken_core.losses.kernels import term_sums, tiles  # noqa: E402

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
CUDA = torch.device("cuda", WORKER % torch.cuda.device_count())
torch.cuda.set_device(CUDA)
ORACLE = sorted((Path(__file__).parents[1] / "oracle").glob("*.safetensors"))

LARGE = {
    "p_kl": Case(("p_kl",), {"vocab_topk": 700}, 2, 150, 3000, seed=40),
    "p_kl_odd_reverse": Case(("p_kl",), {"vocab_topk": 701, "reverse_kl": True, "temperature": 2.0}, 2, 131, 2999, seed=41),
    "p_kl_heavy": Case(("p_kl",), {"vocab_topk": 200}, 2, 100, 5000, top_k_entries=8, seed=42),
    "same": Case(("same",), {"vocab_topk": 900}, 2, 150, 3001, seed=43),
    "gold": Case(("gold",), {"uncommon_topk": 300}, 2, 150, 3000, seed=44),
    "gold_deep": Case(("gold",), {"temperature": 1.5}, 1, 100, 9000, seed=45),
    "h_kl_reverse": Case(("h_kl",), {"reverse_kl": True, "uncommon_topk": 500}, 2, 100, 3003, seed=46),
    "several": Case(("p_kl", "h_kl", "same"), {"vocab_topk": 500}, 2, 100, 3000, coefficients=True, seed=47),
    "hidden_p_kl": Case(("p_kl",), {"vocab_topk": 500}, 2, 150, 3000, hidden=True, coefficients=True, seed=48),
    "hidden_learnable": Case(
        ("p_kl",), {"vocab_topk": 500}, 2, 90, 2000, hidden=True, coefficients=True, learnable=True, seed=49
    ),
    "hidden_gold": Case(("gold",), {}, 2, 150, 2999, hidden=True, coefficients=True, seed=50),
    "hidden_late": Case(("p_kl", "same"), {"vocab_topk": 500}, 2, 100, 2000, hidden=True, seed=51),
    "hidden_partition": Case(("partition_kl",), {}, 2, 150, 3000, hidden=True, coefficients=True, seed=52),
    "hidden_partitions": Case(("partition_kl", "partition_kl"), {}, 2, 131, 2999, hidden=True, coefficients=True, seed=53),
}
EVERY = CASES | {f"large_{name}": case for name, case in LARGE.items()}


@pytest.mark.parametrize("name", EVERY)
def test_float32(name):
    compare(EVERY[name], CUDA, torch.float32)


@pytest.mark.parametrize("name", [n for n, c in EVERY.items() if not c.hidden])
def test_bfloat16_no_further_from_truth_than_plain(name):
    """From the same bf16 logits, the gradient is as near to float64's as plain float32 PyTorch's, rounded to bf16.

    partition_kl's is rounded by itself, and added to the others'.
    """
    case = EVERY[name]
    _, found = evaluate(term_sums, case, CUDA, torch.bfloat16)
    _, plainly = evaluate(plain.term_sums, case, CUDA, torch.float32, inputs_dtype=torch.bfloat16)
    _, truth = evaluate(plain.term_sums, case, CUDA, torch.float64, inputs_dtype=torch.bfloat16)
    rounded = distance(plainly[0].to(torch.bfloat16), truth[0])
    assert distance(found[0], truth[0]) <= (1.1 if "partition_kl" in case.modes else 1.02) * rounded + 1e-6


@pytest.mark.parametrize("name", [n for n, c in EVERY.items() if c.hidden])
def test_bfloat16_from_hidden_states(name):
    """Gradients of hidden states and lm_head from bf16 within what bf16 logits allow."""
    case = EVERY[name]
    sums, found = evaluate(term_sums, case, CUDA, torch.bfloat16)
    truth_sums, truth = evaluate(plain.term_sums, case, CUDA, torch.float64, inputs_dtype=torch.bfloat16)
    assert torch.allclose(sums.ce.double(), truth_sums.ce, rtol=1e-2)
    for a, b in zip(found, truth, strict=True):
        assert distance(a, b) < 0.03


@pytest.mark.parametrize("name", [n for n, c in EVERY.items() if c.hidden])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_change_nothing(name, dtype, monkeypatch):
    case = replace(EVERY[name], length=max(EVERY[name].length, 40))
    whole, expected = evaluate(term_sums, case, CUDA, dtype)
    monkeypatch.setattr(tiles, "TILE_ROWS", 16)
    cut, found = evaluate(term_sums, case, CUDA, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert torch.allclose(whole.ce, cut.ce, rtol=tolerance)
    assert torch.allclose(whole.kd, cut.kd, rtol=tolerance, atol=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < tolerance


@pytest.mark.parametrize("name", LARGE)
def test_bitwise_equal_on_repeat(name):
    first, gradients = evaluate(term_sums, LARGE[name], CUDA, torch.bfloat16)
    for _ in range(3):
        again, repeated = evaluate(term_sums, LARGE[name], CUDA, torch.bfloat16)
        assert torch.equal(first.kd, again.kd) and torch.equal(first.ce, again.ce)
        assert all(torch.equal(a, b) for a, b in zip(gradients, repeated, strict=True))


@pytest.mark.parametrize("kind", ["coarse", "flat", "alike", "peaked", "steps"])
def test_sorted_columns_with_ties(kind, monkeypatch):
    """Sorting by counting: heavy ties, equal logits, both sides alike, almost all mass on one token, and few distinct values."""
    case = Case(("gold",), {"uncommon_topk": 211, "chunk_distribution": "first"}, 2, 40, 1200, seed=60)
    student, ids, mask, samples, teachers, spec, coefficients = build(case)
    generator = torch.Generator().manual_seed(1)

    def shaped(z):
        if kind == "coarse":
            return z.mul(2).round() / 2
        if kind == "flat":
            return torch.zeros_like(z)
        if kind == "alike":
            return torch.linspace(-3, 3, z.shape[-1], dtype=z.dtype).expand(z.shape)[
                ..., torch.randperm(z.shape[-1], generator=generator)
            ]
        if kind == "peaked":
            return z.index_fill(-1, torch.tensor([3]), 60.0)
        return z.sign()

    student = student.over_positions(shaped)
    teachers = [replace(t, logits=t.logits.over_positions(shaped)) for t in teachers]
    monkeypatch.setattr(kernel_cases, "build", lambda _: (student, ids, mask, samples, teachers, spec, coefficients))
    found, gradients = evaluate(term_sums, case, CUDA, torch.float32)
    expected, truth = evaluate(plain.term_sums, case, CUDA, torch.float32)
    assert torch.allclose(found.uncommon, expected.uncommon, rtol=1e-4, atol=1e-5), (found.uncommon, expected.uncommon)
    assert torch.allclose(found.kd, expected.kd, rtol=1e-4, atol=1e-5)
    if kind != "alike":  # there both sides' values differ by rounding alone, and signs with them
        assert distance(gradients[0], truth[0]) < 1e-4


def test_nothing_counts(monkeypatch):
    """All rows masked: sums and gradients are zero, and finite."""
    student, ids, mask, samples, teachers, spec, _ = build(EVERY["several"])

    def masked(_):
        return student, ids, torch.zeros_like(mask), torch.zeros_like(samples), teachers, spec, None

    monkeypatch.setattr(kernel_cases, "build", masked)
    sums, gradients = evaluate(term_sums, EVERY["several"], CUDA, torch.float32)
    assert sums.ce == 0 and (sums.kd == 0).all() and (gradients[0] == 0).all()


@pytest.mark.parametrize("path", ORACLE, ids=lambda p: p.stem)
def test_oracle(path):
    """The published implementation's cases, through the public call on the GPU."""
    batch, teachers, spec, expected = oracle_case(path, torch.float32)
    batch = [x.detach().to(CUDA) for x in batch]
    batch[0].requires_grad_()
    moved = []
    for t in teachers:
        fields = {k: v.to(CUDA) for k, v in vars(t).items() if isinstance(v, torch.Tensor)}
        moved.append(replace(t, projection=t.projection and t.projection.to(CUDA), **fields))
    out = distillation_loss(*batch, moved, spec)
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(expected["loss"], rel=1e-5)
    assert distance(batch[0].grad, expected["grad"]) < 1e-4
