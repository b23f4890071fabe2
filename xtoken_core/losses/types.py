"""What goes into the losses and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from xtoken_core.projection import Projection


@dataclass(frozen=True)
class HiddenLogits:
    """Logits that are not there yet: final hidden states and the lm_head that turns them into logits.

    The logits are `softcap(scale * (hidden @ weight.T + bias))`, with softcap(x) = cap * tanh(x / cap) where a cap is set
    (Gemma's final_logit_softcapping; Granite's and Cohere's logit scale). Losses that can, form them one tile at a time.
    """

    hidden: Tensor
    """[B, T, D], after the final norm."""
    weight: Tensor
    """[V, D]: rows of padding beyond the tokenizer's ids already dropped."""
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, V), as of the logits."""
        return self.hidden.shape[0], self.hidden.shape[1], self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Of the hidden states."""
        return self.hidden.device

    def dense(self) -> Tensor:
        """The logits [B, T, V] in the dtype of the hidden states."""
        logits = self.hidden @ self.weight.to(self.hidden.dtype).T
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


@dataclass(frozen=True)
class TopKLogits:
    """The k largest logits of every position of a teacher with the student's vocabulary."""

    values: Tensor
    """[B, T, k], in the compute dtype."""
    indices: Tensor
    """[B, T, k] int32 or int64 vocabulary ids."""
    vocab_size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, V), as of the logits."""
        return self.values.shape[0], self.values.shape[1], self.vocab_size

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self.values.device


@dataclass(frozen=True)
class AveragedLogits:
    """The weighted sum of several teachers' logits over one vocabulary (aggregation: averaged_logits)."""

    parts: tuple[Tensor | HiddenLogits, ...]
    """Each [B, T, V]."""
    weights: tuple[float, ...]
    """One per part, summing to 1."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, V), as of the logits."""
        b, t, v = self.parts[0].shape
        return b, t, v

    @property
    def device(self) -> torch.device:
        """Of the parts."""
        return self.parts[0].device

    def dense(self) -> Tensor:
        """The averaged logits [B, T, V] in float32, or in float64 if the parts are."""
        dense = [part.dense() if isinstance(part, HiddenLogits) else part for part in self.parts]
        dtype = torch.promote_types(dense[0].dtype, torch.float32)
        total = dense[0].to(dtype) * self.weights[0]
        for logits, weight in zip(dense[1:], self.weights[1:], strict=True):
            total = total.add(logits.to(dtype), alpha=weight)
        return total


Logits = Tensor | HiddenLogits | TopKLogits | AveragedLogits
"""What may stand for logits [B, T, V]; all have `.shape` (B, T, V) and `.device`."""


@dataclass(frozen=True)
class TeacherBatch:
    """One teacher's view of the student's batch.

    Cross-tokenizer: everything is set. Same vocabulary: `projection` is None, positions are the student's, and all but
    `logits` may be None. Chunk ids are of the token at that position (not shifted), -1 outside chunks.
    """

    logits: Logits
    """[B, T_t, V_t]; columns of padding beyond the tokenizer's ids already dropped."""
    input_ids: Tensor | None = None
    """[B, T_t] int64."""
    token_mask: Tensor | None = None
    """[B, T_t]: 1 where the token counts (neither padding nor left out of the loss)."""
    student_chunk_id: Tensor | None = None
    """[B, T_s] int."""
    teacher_chunk_id: Tensor | None = None
    """[B, T_t] int."""
    chunk_valid: Tensor | None = None
    """[B, C] bool: the chunk exists and holds no padding and no special token."""
    chunk_exact: Tensor | None = None
    """[B, C] bool: its text is equal on both sides."""
    projection: Projection | None = None
    weight: float = 1.0
    mode: str | None = None
    """p_kl | h_kl | gold; None: the loss spec's mode."""
    token_bytes: Tensor | None = None
    """[B, T_t] int: bytes of each token; only read with score_unit: byte."""


@dataclass(frozen=True)
class Coefficients:
    """The factors of the terms in the loss, where they are known before the terms are: loss = ce * CE sum + kd · KD sums."""

    ce: Tensor
    """0-dim, no gradient."""
    kd: Tensor
    """[n] of the n teachers handed to `term_sums`, no gradient."""


@dataclass(frozen=True)
class TermSums:
    """The terms of the loss of one batch as sums, not means. See `plain.term_sums`."""

    ce: Tensor
    """0-dim: sum over the counted tokens of -log p(token), nats."""
    kd: Tensor
    """[n]: per teacher τ² times the sum over its valid chunks (same vocabulary: the counted tokens) of their KD, nats."""
    correct: Tensor
    """0-dim, no gradient: counted tokens that are the student's argmax."""
    common: Tensor
    """[n], no gradient: gold and h_kl, the common columns' part of `kd` without τ²; 0 for other teachers."""
    uncommon: Tensor
    """[n], no gradient: gold and h_kl, the uncommon columns' part of `kd` without τ²; 0 for other teachers."""
    total: Tensor | None = None
    """0-dim: coefficients.ce * ce + coefficients.kd · kd. Set where coefficients were given, and then alone differentiable."""
