"""Teachers whose products are formed in 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.gpus import needs_gpus
from tests.support.tiny import tiny_model
from xtoken_core.errors import InputError
from xtoken_core.layers import decoder_layers
from xtoken_core.models import load_model
from xtoken_core.teachers.fp8 import FP8, Fp8Linear, rounded, to_fp8

CPU = torch.device("cpu")


def test_a_row_is_rounded_by_its_own_scale():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-6], [1.0], [1e3], [0.0], [1e-30]])
    small, scale = rounded(x)
    assert small.dtype == FP8 and scale.shape == (5, 1)
    error = (small.float() * scale - x).abs()
    assert (error[:3] <= x[:3].abs() / 16 + x[:3].abs().amax(1, keepdim=True) * 2**-9 / 448).all()  # three bits after the point
    assert (small[3] == 0).all()


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_near_those_of_the_layer(bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 48, bias=bias)
    x = torch.randn(2, 7, 96)
    found, expected = Fp8Linear(linear)(x), linear(x)
    assert found.shape == expected.shape and found.dtype == x.dtype
    assert (found - expected).norm() < 0.05 * expected.norm()


@needs_gpus(1)
def test_a_gpu_gives_what_a_cpu_gives():
    torch.manual_seed(0)
    layer, x = Fp8Linear(nn.Linear(256, 128).bfloat16()), torch.randn(3, 33, 256).bfloat16()
    expected = layer(x).float()
    assert (layer.cuda()(x.cuda()).float().cpu() - expected).norm() < 5e-3 * expected.norm()


def test_layers_are_replaced_and_the_head_is_not(tmp_path):
    model = load_model(str(tiny_model(tmp_path / "m", 400)))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        to_fp8(model, CPU, "teacher")
        after = model(ids).logits.log_softmax(-1)
    assert all(isinstance(m, Fp8Linear) for layer in decoder_layers(model) for m in layer.modules() if hasattr(m, "weight") and m.weight.ndim == 2)  # fmt: skip  # noqa: E501
    assert type(model.get_output_embeddings()) is nn.Linear
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert 0 < divergence < 0.01


def test_layers_that_do_not_fit_are_named(tmp_path):
    model = load_model(str(tiny_model(tmp_path / "m", 400)))
    for layer in decoder_layers(model):
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, nn.Linear(child.in_features, 7))
    with pytest.raises(InputError, match="has no linear layers of a size that fits"):
        to_fp8(model, CPU, "teacher")
