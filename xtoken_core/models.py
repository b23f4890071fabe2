"""Causal language models: load from anywhere, take the lm_head apart, save."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from xtoken_core.configs import empty_model, model_place, one_line, read_config
from xtoken_core.errors import InputError
from xtoken_core.finite import check_weights
from xtoken_core.layers import decoder, first_layers
from xtoken_core.losses.logits import HiddenLogits
from xtoken_core.tokenization import TokenTable, load_tokenizer

log = logging.getLogger(__name__)


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


def load_model(ref: str, dtype: torch.dtype = torch.float32, attention: str = "auto", packed: bool = False) -> PreTrainedModel:
    """Loads a causal language model onto the CPU, in eval mode.

    `ref` is a hub id, a local folder, a .gguf file, or an fsspec URI of either. `attention: auto` is sdpa where the model has
    it, else eager; which it is, is logged. Raises InputError, also for weights that are not all there or not finite, a head that
    `head_logits` does not know (`check_head`), and where rows are to be `packed`, a model that mixes their documents
    (`check_packing`).
    """
    config = read_config(ref)
    if attention in ("auto", "sdpa"):
        attention = empty_model(ref, config, attention).config._attn_implementation
    log.info("%s: attention: %s", ref, attention)
    place, gguf = model_place(ref)
    options: dict[str, Any] = {"gguf_file": gguf["gguf_file"]} if gguf else {"config": config}
    options |= {"dtype": dtype, "attn_implementation": attention, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with one_line(ref):
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=False, **options)
    model, info = loaded
    for what, names in (("missing", info["missing_keys"]), ("of another shape", {key for key, *_ in info["mismatched_keys"]})):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{ref}: cannot load the model: weights {what}: {min(names)}{more}")
    model = (_plain_copy(model, attention) if gguf else model).eval()
    check_weights(model, ref)
    if attention == "flash_attention_2":  # runs on GPUs alone, the checks on the CPU
        model.set_attn_implementation("sdpa")
    with first_layers(model), one_line(ref):  # all of a large model would take minutes on a CPU
        check_head(model, ref)
        if packed:
            check_packing(model, ref)
    model.set_attn_implementation(attention)
    return model


def _plain_copy(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """The same weights in a fresh model: one that came from a GGUF counts as quantised and refuses `save_pretrained`."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention, trust_remote_code=False)
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
    return decoder(model)(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state


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
    if not own.isfinite().all():
        raise InputError(f"{who}: its logits are not finite")
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
