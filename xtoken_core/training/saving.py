"""The student as its users get it: whole weights in its source's dtype, under the config and generation config that it came with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xtoken_core.training.adapters import ADAPTER, is_adapted, merged_weight

ADAPTERS = "adapters"
"""Folder beside the merged weights that keeps the adapters (`student.lora`)."""


def save_finished(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    weights: Mapping[str, Tensor] | None,
) -> None:
    """Saves model and tokenizer so that `AutoModelForCausalLM` and `AutoTokenizer` load them from `folder`.

    Adapters are merged into the weights, and kept beside them. Tied weights are stored once.

    Args:
        model: the trained model, with or without adapters.
        tokenizer: its own.
        folder: where to write.
        dtype: of the stored weights.
        weights: the model's state dict, where its own parameters are sharded over ranks.
    """
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in whole_weights(model, weights)}
    with torch.device("meta"):
        plain = type(model)._from_config(model.config, dtype=dtype)
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    if any(is_adapted(module) for module in model.modules()):
        model.save_pretrained(folder / ADAPTERS)


@torch.no_grad()
def whole_weights(model: PreTrainedModel, weights: Mapping[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
    """Yields every stored weight by the name that a plain model of this kind has for it; of tied ones the first."""
    state = model.state_dict() if weights is None else weights
    modules: dict[str, nn.Module] = dict(model.named_modules())
    kept = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    for name in kept & state.keys():
        owner, _, leaf = name.rpartition(".")
        if f".{ADAPTER}." in f".{name}.":
            continue
        if owner.endswith(".base_layer"):
            layer = owner.removesuffix(".base_layer")
            merged = merged_weight(modules[layer], state[name]) if leaf == "weight" else state[name]
            yield f"{layer}.{leaf}", merged
        else:
            yield name, state[name]
