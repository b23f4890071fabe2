"""Tiny configurations of the architectures that students and teachers come in."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_COMMON: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_HEADS = _COMMON | {"head_dim": 16}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 8,
}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}

SIZES: dict[str, dict[str, Any]] = {
    "llama": _HEADS,
    "mistral": _HEADS,
    "qwen2": _COMMON,
    "qwen3": _HEADS,
    "phi3": _COMMON,
    "gemma2": _HEADS,
    "gemma3_text": _HEADS,
    "smollm3": _COMMON,
    "gpt2": {"vocab_size": 60, "n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1},
    "bloom": {"vocab_size": 60, "hidden_size": 32, "n_layer": 4, "n_head": 2},
    "mpt": {"vocab_size": 60, "d_model": 32, "n_layers": 4, "n_heads": 2, "max_seq_len": 64},
    "gpt_oss": _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": _HEADS | {"intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2},
    "deepseek_v3": _COMMON
    | _EXPERTS
    | _LATENT
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 2},
    "qwen3_moe": _HEADS | _EXPERTS | {"num_experts": 4, "decoder_sparse_step": 2},
    "qwen3_next": _HEADS | _EXPERTS | _LINEAR | {"num_experts": 4, "mlp_only_layers": [3]},
    "glm4_moe": _HEADS | _EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 2},
    "ernie4_5_moe": _COMMON
    | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "moe_layer_start_index": 1, "moe_layer_end_index": 3},
    "lfm2_moe": _COMMON
    | _EXPERTS
    | {"num_experts": 4, "num_dense_layers": 2, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "gemma3n_text": _HEADS
    | {"vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1, "laurel_rank": 4},
}
"""Four layers each, of every kind that the architecture has; by transformers' name of the architecture."""


def tiny_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of one architecture, with some fields changed."""
    return AutoConfig.for_model(kind, **SIZES[kind] | changes)
