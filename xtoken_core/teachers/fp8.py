"""A frozen teacher's products in 8 bits: weights rounded once, activations as they come, each row by a scale of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xtoken_core.errors import InputError
from xtoken_core.layers import decoder_layers

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_CAPABILITY = (8, 9)
"""Of GPUs that multiply numbers of 8 bits."""
_MULTIPLE = 16
"""What both sizes of a weight have to be a multiple of."""

_ROUTERS = ("gate", "router")
"""Layers that choose experts: small, and what they choose would change."""


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k] -> x / scale in float8 and the scale [n, 1] float32, which makes the largest number of a row the largest of float8."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(FP8), scale


class Fp8Linear(nn.Module):
    """A linear layer without gradients whose product is formed in float8. On a CPU in float32, from the same rounded numbers."""

    def __init__(self, linear: nn.Linear, device: torch.device | None = None):
        """device: where to round; the rounded weight lies where the layer's did."""
        super().__init__()
        home = linear.weight.device
        weight, scale = (x.to(home) for x in rounded(linear.weight.detach().to(device)))
        self.weight = nn.Parameter(weight, requires_grad=False)
        """[out, in] float8."""
        self.scale = nn.Parameter(scale.T.contiguous(), requires_grad=False)
        """[1, out] float32."""
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of x."""
        rows, scale = rounded(x.flatten(0, -2))
        if x.device.type == "cpu":
            product = ((rows.float() * scale) @ (self.weight.float().T * self.scale)).to(x.dtype)
            return (product if self.bias is None else product + self.bias).unflatten(0, x.shape[:-1])
        product = torch._scaled_mm(rows, self.weight.T, scale, self.scale, self.bias, out_dtype=x.dtype, use_fast_accum=True)
        return product.unflatten(0, x.shape[:-1])


def to_fp8(model: PreTrainedModel, device: torch.device, who: str) -> None:
    """Replaces the linear layers of a model's decoder layers, in place; embedding, lm_head and routers stay as they are.

    Raises InputError where the GPU has no such products, or the layers no linear ones.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise InputError(f"{who}: precision: {torch.cuda.get_device_name(device)} has no fp8 products; use bf16")
    found = 0
    for layer in decoder_layers(model):
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if not isinstance(child, nn.Linear) or name in _ROUTERS:
                    continue
                if not any(size % _MULTIPLE for size in child.weight.shape):
                    setattr(module, name, Fp8Linear(child, device))
                    found += 1
    if not found:
        raise InputError(f"{who}: precision: fp8: {type(model).__name__} has no linear layers of a size that fits")
