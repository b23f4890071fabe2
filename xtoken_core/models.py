"""Causal language models: load from anywhere, prune in depth, take the lm_head apart, save."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from xtoken_core.errors import InputError
from xtoken_core.losses.types import HiddenLogits
from xtoken_core.tokenization import TokenTable, load_tokenizer

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Loaded:
    """A model together with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    table: TokenTable
    """The bytes of the tokenizer's ids."""
    rows: int
    """Rows of the lm_head that belong to ids of the tokenizer; rows beyond them are padding."""

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, who: str) -> Loaded:
        """Puts a model and its tokenizer together. `who` names the model in the InputError for an lm_head of too few rows."""
        table = TokenTable.from_tokenizer(tokenizer)
        return cls(model, tokenizer, table, vocabulary_rows(model, len(table), table.min_rows, who))


def load(ref: str, tokenizer: str | None, who: str, dtype: torch.dtype, attention: str) -> Loaded:
    """Loads a model and its tokenizer onto the CPU; `tokenizer` None: the model's own. Raises InputError as `load_model` does."""
    loaded = load_tokenizer(ref, tokenizer)
    return Loaded.of(load_model(ref, dtype, attention), loaded, who)


def load_model(ref: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", packed: bool = False) -> PreTrainedModel:
    """Loads a causal language model onto the CPU, in eval mode.

    `ref` is a hub id, a local folder, a .gguf file, or an fsspec URI of either. Raises InputError, also for weights that are
    not all there, a head that `head_logits` does not know (`check_head`), and where rows are to be `packed`, a model that
    mixes their documents (`check_packing`).
    """
    place, gguf = _place(ref)
    options = {"dtype": dtype, "attn_implementation": attention, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with _named(ref):
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, **gguf, **options)
    model, info = loaded
    for what, names in (("missing", info["missing_keys"]), ("of another shape", {key for key, *_ in info["mismatched_keys"]})):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{ref}: cannot load the model: weights {what}: {min(names)}{more}")
    model = (_plain_copy(model, attention) if gguf else model).eval()
    if attention == "flash_attention_2":  # runs on GPUs alone, the checks on the CPU
        model.set_attn_implementation("sdpa")
    with first_layers(model):  # all of a large model would take minutes on a CPU
        check_head(model, ref)
        if packed:
            check_packing(model, ref)
    model.set_attn_implementation(attention)
    return model


def weight_bytes(ref: str, dtype: torch.dtype) -> int:
    """Bytes of a model's weights, from its configuration alone. Raises InputError."""
    config = _configuration(ref)
    with _named(ref), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(p.nbytes for p in model.parameters())


def head_rows(ref: str) -> int:
    """Rows of a model's lm_head, from its configuration alone. Raises InputError."""
    return _configuration(ref).get_text_config().vocab_size


def _configuration(ref: str) -> PreTrainedConfig:
    place, gguf = _place(ref)
    with _named(ref):
        return AutoConfig.from_pretrained(place, **gguf)


def _place(ref: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds the model, and the name of its GGUF there."""
    path = Path(_local(ref))
    if not path.exists() and not _HUB_ID.fullmatch(ref):
        raise InputError(f"{ref}: cannot load the model: no such file or folder")
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return str(path) if path.exists() else ref, {}


@contextmanager
def _named(ref: str) -> Iterator[None]:
    """Whatever transformers raises over a model that it cannot read, as one line that names the model."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, StrictDataclassError, UnpicklingError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(f"{ref}: cannot load the model: {reason}") from e


def _local(ref: str) -> str:
    if "://" not in ref:
        return ref
    from xtoken_core.storage import local_copy

    return str(local_copy(ref))


def _plain_copy(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """The same weights in a fresh model: one that came from a GGUF counts as quantised and refuses `save_pretrained`."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    return fresh


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Saves model and tokenizer so that `AutoModelForCausalLM` and `AutoTokenizer` load them from `folder`.

    `weights`: the state dict, where the model's own parameters are sharded over ranks.
    """
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of transformer layers: the one ModuleList of the base model that is `num_hidden_layers` long."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(model).__name__}: found no stack of {count} layers")


@contextmanager
def first_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model has only its first layers, as many as hold one of every kind that it has (attention, recurrence, ...).

    A model whose layers are not in one stack stays whole.
    """
    try:
        layers = decoder_layers(model)
    except InputError:
        yield
        return
    types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    kinds = [(type(layer), kind) for layer, kind in zip(layers, types)]
    rest = list(layers)[max(map(kinds.index, kinds)) + 1 :]
    del layers[len(layers) - len(rest) :]
    try:
        yield
    finally:
        layers.extend(rest)


def prune_layers(model: PreTrainedModel, keep_layers: int | Sequence[int]) -> PreTrainedModel:
    """Keeps only some of the layers, in place: the given indices, or a count spread evenly from the first to the last."""
    layers, config = decoder_layers(model), model.config.get_text_config()
    total = len(layers)
    if isinstance(keep_layers, int):
        if keep_layers > total:
            raise InputError(f"student.keep_layers: {keep_layers} layers asked for, the model has {total}")
        keep = torch.linspace(0, total - 1, keep_layers).round().int().tolist()
    else:
        keep = list(keep_layers)
        if keep[-1] >= total:
            raise InputError(f"student.keep_layers: no layer {keep[-1]}, the model has {total} (0 to {total - 1})")
    kept = [layers[i] for i in keep]
    for name, value in list(vars(config).items()):  # per-layer settings, such as layer_types
        if isinstance(value, list) and len(value) == total:
            setattr(config, name, [value[i] for i in keep])
    config.num_hidden_layers = len(keep)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its slot in the key-value cache
                module.layer_idx = index
    del layers[:]
    layers.extend(kept)
    return model


def vocabulary_rows(model: PreTrainedModel, num_ids: int, min_rows: int, who: str) -> int:
    """How many rows of the lm_head belong to ids of the tokenizer; rows beyond them are padding.

    num_ids, min_rows: `len(table)` and `table.min_rows` of its TokenTable. `who` names the model in the InputError for too few rows.
    """
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < min_rows:
        raise InputError(f"{who}: its lm_head has {rows} rows, fewer than the {min_rows} ids of its tokenizer")
    return min(rows, num_ids)


def final_hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Hidden states [B, T, D] after the final norm of right-padded rows [B, T].

    There is no attention mask: a causal model never looks from a real token at padding behind it, and without a mask
    attention takes its fast path. `position_ids` that restart at 0 mark packed documents, and transformers keeps
    attention within each.
    """
    return model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state


def head_logits(model: PreTrainedModel, hidden: Tensor, rows: int) -> HiddenLogits:
    """The model's logits of final hidden states [B, T, D], not yet formed, over the first `rows` vocabulary ids."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)  # Cohere; Granite
    bias = getattr(head, "bias", None)
    return HiddenLogits(
        hidden=hidden,
        weight=head.weight[:rows],
        bias=None if bias is None else bias[:rows],
        scale=float(scale),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


@torch.no_grad()
def check_head(model: PreTrainedModel, who: str) -> None:
    """Proves on a few tokens that `head_logits` gives the model's own logits; InputError for heads of another form."""
    ids = torch.arange(4, device=model.device)[None]
    own = model(input_ids=ids, use_cache=False).logits
    if not _same(own, head_logits(model, final_hidden(model, ids), own.shape[-1]).dense(), model.dtype):
        raise InputError(
            f"{who}: {type(model).__name__} does more after its final hidden states than lm_head, scale and soft cap"
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel, who: str) -> None:
    """Proves that a document comes out the same behind any other of its row; InputError for models that carry state along."""
    ids = torch.tensor([[0, 1, 2, 6, 7, 8], [3, 4, 5, 6, 7, 8]], device=model.device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2, device=model.device)
    behind_one, behind_another = final_hidden(model, ids, positions)[:, 3:]
    if not _same(behind_one, behind_another, model.dtype):
        raise InputError(f"{who}: data.packing: {type(model).__name__} does not keep the documents of a row apart")


def _same(a: Tensor, b: Tensor, computed: torch.dtype) -> bool:
    """Whether two results are equal but for rounding; logits may be float32 though `computed` in less."""
    tolerance = max(1e-4, 3 * torch.finfo(computed).eps)
    return torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * a.abs().max().item())
