"""Low-rank adapters in place of all weights (`student.lora`), by PEFT (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from xtoken_core.errors import InputError
from xtoken_core.spec import LoraSpec

ADAPTER = "default"
"""PEFT's name of the one adapter."""


def check_lora() -> None:
    """Raises InputError where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("student.lora: needs PEFT: pip install 'xtoken-pipelines[lora]'")


def add_adapters(model: PreTrainedModel, lora: LoraSpec, checkpoint: Path | None) -> None:
    """Freezes the model and gives its linear layers adapters: new ones that change nothing, or those of a `checkpoint`.

    Raises InputError where the model has no layer of a name in `lora.targets`.
    """
    from peft import LoraConfig

    targets: Any = "all-linear" if lora.targets is None else list(lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    try:
        model.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as e:
        raise InputError(f"student.lora.targets: {str(e).splitlines()[0]}") from None
    if checkpoint is not None:
        model.load_adapter(str(checkpoint), adapter_name=ADAPTER, hotswap=True)
        model.set_adapter(ADAPTER)


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a linear layer with an adapter."""
    return hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")


def merged_weight(layer: Any, base: Tensor) -> Tensor:
    """[out, in] float32: the weight of an adapted layer with its adapter in it."""
    return base.float() + layer.get_delta_weight(ADAPTER).float()
