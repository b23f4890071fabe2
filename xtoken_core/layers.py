"""The stack of a model's layers: found, shortened for a moment, pruned for good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from xtoken_core.errors import InputError

_INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers")
"""Fields of configurations that list layers by index."""
_COUNTS = ("first_k_dense_replace", "num_dense_layers")
"""Fields that count layers of a kind from the first on."""


def decoder(model: PreTrainedModel) -> nn.Module:
    """The model without its lm_head."""
    base = model.base_model
    return model.get_submodule("model") if base is model else base  # Llama 4's text model names its base as its wrapper does


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of transformer layers: the one ModuleList of the base model that is `num_hidden_layers` long."""
    count = model.config.get_text_config().num_hidden_layers
    for module in decoder(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(model).__name__}: found no stack of {count} layers")


@contextmanager
def first_layers(model: PreTrainedModel) -> Iterator[int | None]:
    """Within, the model has only its first layers, as many as hold one of every kind that it has (attention, recurrence, ...): their count.

    A model whose layers are not in one stack stays whole: None.
    """
    try:
        layers = decoder_layers(model)
    except InputError:
        yield None
        return
    types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    kinds = [(type(layer), kind) for layer, kind in zip(layers, types)]
    rest = list(layers)[max(map(kinds.index, kinds)) + 1 :]
    del layers[len(layers) - len(rest) :]
    try:
        yield len(layers)
    finally:
        layers.extend(rest)


def prune_layers(model: PreTrainedModel, keep_layers: int | Sequence[int]) -> PreTrainedModel:
    """Keeps only some of the layers, in place: the given indices, or a count spread evenly from the first to the last.

    The configuration tells of the kept layers afterwards. Raises InputError for layers that are not there, and for a model
    whose configuration cannot tell of them: saved, it would load as another.
    """
    layers = decoder_layers(model)
    keep = kept_layers(len(layers), keep_layers)
    kept = [layers[i] for i in keep]
    _tell_of(model.config.get_text_config(), keep)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its slot in the key-value cache
                module.layer_idx = index  # type: ignore[assignment]
    del layers[:]
    layers.extend(kept)
    _prove(model)
    return model


def kept_layers(total: int, keep_layers: int | Sequence[int]) -> list[int]:
    """The indices of the layers that `student.keep_layers` keeps of `total`. Raises InputError for layers that are not there."""
    if isinstance(keep_layers, int):
        if keep_layers > total:
            raise InputError(f"student.keep_layers: {keep_layers} layers asked for, the model has {total}")
        return torch.linspace(0, total - 1, keep_layers, device="cpu").round().int().tolist()
    if keep_layers[-1] >= total:
        raise InputError(f"student.keep_layers: no layer {keep_layers[-1]}, the model has {total} (0 to {total - 1})")
    return list(keep_layers)


def _tell_of(config: PreTrainedConfig, keep: list[int]) -> None:
    """Makes a configuration tell of the kept layers only: counts, periods and lists that name layers."""
    total = config.num_hidden_layers
    step = getattr(config, "decoder_sparse_step", None)
    if step is not None:  # Qwen: every step-th layer has experts, but those listed
        dense = {i for i in range(total) if i in config.mlp_only_layers or (i + 1) % step}
        config.mlp_only_layers, config.decoder_sparse_step = sorted(dense), 1
    if getattr(config, "moe_layer_interval", None) is not None:  # Ernie: every so many from one layer to another
        first, last = config.moe_layer_start_index, config.moe_layer_end_index % total
        moe = [new for new, old in enumerate(keep) if first <= old <= last and (old + 1) % config.moe_layer_interval == 0]
        config.moe_layer_start_index, config.moe_layer_end_index = (moe[0], moe[-1]) if moe else (len(keep), len(keep))
        config.moe_layer_interval = 1
    for name, value in list(vars(config).items()):
        if name in _INDICES and isinstance(value, list):
            setattr(config, name, [new for new, old in enumerate(keep) if old in value])
        elif name in _COUNTS and isinstance(value, int):
            setattr(config, name, sum(old < value for old in keep))
        elif isinstance(value, list) and len(value) == total and not name.endswith(("_id", "_ids", "architectures")):
            setattr(config, name, [value[i] for i in keep])  # one setting a layer, such as layer_types
    config.num_hidden_layers = len(keep)


def _prove(model: PreTrainedModel) -> None:
    """Raises InputError unless the configuration, stored and read again, makes a model of the very shapes and settings."""
    try:
        with torch.device("meta"):
            again = AutoModelForCausalLM.from_config(
                type(model.config).from_dict(model.config.to_dict()), trust_remote_code=False
            )
        ours, stored = _described(model), _described(again)
    except Exception as e:  # a configuration that names layers which are gone raises anything
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(f"student.keep_layers: {type(model).__name__} cannot be pruned so: {reason}") from e
    differing = sorted(name for name in ours.keys() | stored.keys() if ours.get(name) != stored.get(name))
    if differing:
        raise InputError(
            f"student.keep_layers: {type(model).__name__} cannot be pruned so: its configuration has no way to tell of the kept "
            f"layers ({differing[0]}{f' and {len(differing) - 1} more differ' if differing[1:] else ' differs'})"
        )


def _described(model: PreTrainedModel) -> dict[str, Any]:
    """Shapes of all weights by name, and of each layer's modules their class and plain settings."""
    found: dict[str, Any] = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for index, layer in enumerate(decoder_layers(model)):
        for place, module in layer.named_modules():
            where = f"layer {index}{place and '.'}{place}"
            found[where] = type(module).__name__
            for name, value in vars(module).items():
                if name[0] != "_" and name not in ("layer_idx", "training") and isinstance(value, (bool, int, float, str)):
                    found[f"{where}.{name}"] = value
    return found
