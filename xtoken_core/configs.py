"""What a model's configuration tells before any weight is read. Code that comes with a model is never run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from xtoken_core.errors import InputError
from xtoken_core.storage import local_copy, normalize

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DEQUANTISED = ("fp8", "mxfp4")
"""Formats that transformers turns back into plain weights while it loads them, on any device."""
MOST_LAYERS = 10_000
"""A bound above every model: a configuration with more is damaged, and building it would take for ever."""


def model_place(ref: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds a whole model, downloaded if it lies at a URI, and the name of its GGUF there. Raises InputError."""
    path = Path(str(local_copy(ref)) if "://" in ref else normalize(ref))
    if not path.exists() and not _HUB_ID.fullmatch(ref):
        raise InputError(f"{ref}: cannot load the model: no such file or folder")
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return str(path) if path.exists() else ref, {}


@contextmanager
def one_line(ref: str) -> Iterator[None]:
    """Turns whatever transformers raises over a model that it cannot read or run into one line that names the model."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, InputError):
        raise
    except Exception as e:  # a damaged configuration can raise anything, from KeyError to ZeroDivisionError
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(f"{ref}: cannot load the model: {reason}") from e


def read_config(ref: str) -> PreTrainedConfig:
    """Reads a model's configuration; of a folder at a URI only config.json is fetched.

    Raises InputError for a configuration that makes no model that this library loads: a LoRA adapter, code of its own,
    weights quantised in a format that cannot be undone, sizes that cannot be.
    """
    place, gguf = _config_place(ref)
    if gguf:
        with one_line(ref):
            return AutoConfig.from_pretrained(place, **gguf, trust_remote_code=False)
    with one_line(ref):
        told, _ = PreTrainedConfig.get_config_dict(place)
        _refuse(ref, told)
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        if told.get("quantization_config") is not None:
            config.quantization_config = told["quantization_config"] | {"dequantize": True}
        _check_sizes(ref, config.get_text_config())
    return config


def _config_place(ref: str) -> tuple[str, dict[str, str]]:
    if "://" in ref and not ref.endswith(".gguf"):
        return str(local_copy(f"{ref.rstrip('/')}/config.json")), {}
    place, gguf = model_place(ref)
    if (Path(place) / "adapter_config.json").exists():
        raise InputError(f"{ref}: cannot load the model: it is a LoRA adapter; merge it into its base model and give that")
    return place, gguf


def _refuse(ref: str, told: dict[str, Any]) -> None:
    """Raises InputError for what cannot be loaded as it is, by the raw config.json."""
    if told.get("auto_map") and told.get("model_type") not in CONFIG_MAPPING:
        raise InputError(f"{ref}: cannot load the model: it needs code of its own (auto_map), and such code is never run")
    quantised = told.get("quantization_config")
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if not isinstance(method, str):
        raise InputError(f"{ref}: cannot load the model: quantization_config names no quant_method")
    if method not in DEQUANTISED:
        raise InputError(f"{ref}: cannot load the model: its weights are quantised ({method[:40]}); give the unquantised ones")


def _check_sizes(ref: str, config: PreTrainedConfig) -> None:
    layers = getattr(config, "num_hidden_layers", 1)
    if not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
        raise InputError(f"{ref}: cannot load the model: num_hidden_layers: {layers!r}")
    for name, value in config.to_dict().items():
        if name.endswith(("dropout", "_pdrop", "dropout_prob")) and isinstance(value, int | float) and not 0 <= value < 1:
            raise InputError(f"{ref}: cannot load the model: {name}: {value:g}")
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and (min(heads, groups) < 1 or heads % groups):
        raise InputError(
            f"{ref}: cannot load the model: num_attention_heads: {heads} do not divide over {groups} num_key_value_heads"
        )


def empty_model(ref: str, config: PreTrainedConfig, attention: str = "auto", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Builds the model of a configuration on the meta device: every shape, no weight.

    Raises InputError for a configuration that makes no model, and for an attention that the model does not have.
    """
    check_attention(ref, config, attention)
    config = type(config).from_dict(config.to_dict())  # a choice of attention would stay in it
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    chosen = {"attn_implementation": attention} if attention in ("eager", "sdpa") else {}  # the others' packages may not be here
    with one_line(ref), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **chosen)
    for name, weight in model.named_parameters():
        if not weight.numel():
            raise InputError(f"{ref}: cannot load the model: {name} has no elements: {tuple(weight.shape)}")
    return model


def check_attention(ref: str, config: PreTrainedConfig, attention: str) -> None:
    """Raises InputError for a configuration of no causal language model, and for an attention that the model does not have."""
    kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None:
        raise InputError(f"{ref}: cannot load the model: {config.model_type} is not a causal language model")
    has = {"sdpa": kind._supports_sdpa, "flash_attention_2": kind._supports_flash_attn}
    if not has.get(attention, True):
        raise InputError(f"training.attention: {ref} ({kind.__name__}) has no {attention}; auto chooses for each model")


def weight_bytes(ref: str, dtype: torch.dtype) -> int:
    """Bytes of a model's weights, from its configuration alone. Raises InputError."""
    return sum(p.nbytes for p in empty_model(ref, read_config(ref), dtype=dtype).parameters())


def head_rows(ref: str) -> int:
    """Rows of a model's lm_head, from its configuration alone. Raises InputError."""
    return read_config(ref).get_text_config().vocab_size


def stored_dtype(ref: str) -> torch.dtype:
    """The dtype that a model's configuration names for its weights; float32 where it names none. Raises InputError."""
    config = read_config(ref)
    named = config.dtype or config.get_text_config().dtype
    return getattr(torch, named.removeprefix("torch.")) if isinstance(named, str) else named or torch.float32


def compute_dtype(precision: str) -> torch.dtype:
    """What `training.precision` means on this machine. `auto`: bfloat16 where the hardware multiplies it; where it does not, it is
    emulated, some thirty times slower than float32 on a CPU with AVX2 alone.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.10 does not tell
        has = known.get("amx_bf16", False) or known.get("avx512_bf16", False)
    return torch.bfloat16 if has else torch.float32


def positions(config: PreTrainedConfig) -> int | None:
    """How many tokens of one row the model can place, rotary scaling included; None where its configuration sets no bound."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    bound = next((value for name in names if type(value := getattr(config, name, None)) is int), None)
    if bound is None:
        return None
    rotary = getattr(config, "rope_parameters", None) or {}
    scalings = [rotary, *(part for part in rotary.values() if isinstance(part, dict))]
    stretched = [
        int(scaling["factor"] * (scaling.get("original_max_position_embeddings") or bound))
        for scaling in scalings
        if isinstance(scaling.get("factor"), (int, float))
    ]
    return max([bound, *stretched])
