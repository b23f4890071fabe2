"""Numbers that are not finite: found before they reach the weights, skipped by rule, told in one line."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xtoken_core.finite import largest
from xtoken_core.training.step import over_ranks


def all_finite(tensors: Iterable[Tensor | None], device: torch.device) -> bool:
    """Whether every number is finite, over all ranks, which all call this with their shares. Only floating-point tensors count."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    bad = (~largest(local).isfinite()).double()
    return float(over_ranks(bad, device)) == 0


def gradients(module: nn.Module) -> list[Tensor | None]:
    """The gradients of all parameters."""
    return [parameter.grad for parameter in module.parameters()]


def all_weights(module: nn.Module) -> list[Tensor]:
    """All parameters, detached."""
    return [parameter.detach() for parameter in module.parameters()]
