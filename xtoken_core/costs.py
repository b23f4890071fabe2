"""What a run costs, by arithmetic: floating point operations, bytes of memory and of disk. Only sizes go in, nothing is measured.

Sources: 2 operations a weight and token forward, twice that backward (Kaplan et al., arXiv 2001.08361); attention over a row
by its two matrix products, of which causality leaves half; activations of a layer without the scores, which sdpa never
stores: 34 bytes a token and hidden unit in 16 bits (Korthikanti et al., arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

GIB = 2**30
H100_FLOPS = 989e12
"""Dense bfloat16 operations a second of one H100, by its data sheet."""
UTILISATION = 0.4
"""Share of them that a training of this library reaches, where no run has shown another."""
BYTES_PER_TOKEN = 4.0
"""Of text, where no run has shown another; English prose 4.2 to 4.6, code 3.2 to 3.8."""
STEP_BYTES = 2 * GIB
"""Of a step that only loads tokenizers: imports, and tables of a few hundred thousand tokens."""
_LAYER_BYTES = 34
_STATE_BYTES = 16
"""Of a trained weight: it, its gradient and Adam's two moments, in float32."""
_CHECKPOINT_BYTES = 12
"""Of a trained weight in a checkpoint: it and the two moments."""
_EVALUATED_TOKENS, _LOGITS_COPIES = 1024, 4
"""Tokens that get full logits at a time, and how often these lie in memory: logits, log-probabilities, what the losses make."""
_STUDENT_ROW_BYTES, _TEACHER_ROW_BYTES = 7, 15
"""Of a token in prepared rows: id, mask, length; on a teacher's side also chunk ids of both sides."""


@dataclass(frozen=True)
class ModelSize:
    """What a model's configuration says of its size."""

    parameters: int
    active: int
    """Parameters that one token meets: of experts only those it is sent to; the embedding left out."""
    layers: int
    hidden: int
    rows: int
    """Of the lm_head."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSize:
        """Counts the weights of a model, which may lie on the meta device."""
        config = model.config.get_text_config()
        named = {name: weight.numel() for name, weight in model.named_parameters()}
        experts = sum(count for name, count in named.items() if ".experts." in name)
        embedding = model.get_input_embeddings().get_parameter("weight")
        head = model.get_output_embeddings()
        tied = head is None or head.weight is embedding  # then its weights are met in the head
        total = sum(named.values())
        met = total - experts + round(experts * _share_of_experts(config)) - (0 if tied else embedding.numel())
        return cls(total, met, config.num_hidden_layers, config.hidden_size, config.vocab_size)

    def forward_flops(self, tokens: int, row: int) -> float:
        """Operations of a forward pass over `tokens` in rows of `row` tokens."""
        return 2.0 * tokens * (self.active + self.layers * self.hidden * row)

    def training_flops(self, tokens: int, row: int, recomputed: bool) -> float:
        """Operations of forward and backward pass; `recomputed`: activation checkpointing runs the forward pass twice."""
        return (4 if recomputed else 3) * self.forward_flops(tokens, row)

    def state_bytes(self, trained: int, ranks: int) -> float:
        """Memory of a student with `trained` weights on one of the ranks it is spread over."""
        return (trained * _STATE_BYTES + (self.parameters - trained) * 4) / ranks

    def activation_bytes(self, tokens: int, recomputed: bool, width: int) -> float:
        """Memory of what a backward pass over `tokens` needs; width: bytes of a number (2 in bfloat16)."""
        layer = _LAYER_BYTES / 2 * width * self.hidden * tokens
        return layer + self.layers * width * self.hidden * tokens if recomputed else self.layers * layer

    def checkpoint_bytes(self, trained: int) -> int:
        """A checkpoint on disk."""
        return trained * _CHECKPOINT_BYTES


def host_bytes(models: Sequence[ModelSize], gpu: bool) -> int:
    """Host memory of a step that loads models for evaluation, one after another, each through a mapped file of its own size.

    On a GPU (bfloat16) a model leaves the host before the next is read; a CPU (float32) keeps all of them, and their logits.
    """
    width = 2 if gpu else 4
    weights = [size.parameters * width for size in models]
    if gpu:
        return STEP_BYTES + 2 * max(weights)
    logits = _EVALUATED_TOKENS * sum(size.rows for size in models) * 4 * _LOGITS_COPIES
    return STEP_BYTES + sum(weights) + max(weights) + logits


def row_bytes(student_tokens: int, cross_teachers: int) -> int:
    """Prepared rows on disk, where every teacher needs as many tokens as the student."""
    return student_tokens * (_STUDENT_ROW_BYTES + cross_teachers * _TEACHER_ROW_BYTES)


def _share_of_experts(config: PreTrainedConfig) -> float:
    """Of all experts those that a token is sent to."""
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    total = next((value for name in counts if (value := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_k", None)
    return chosen / total if total and chosen else 1.0
