"""What goes into the losses and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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

    def dense(self) -> Tensor:
        """The logits [B, T, V] in the dtype of the hidden states."""
        logits = self.hidden @ self.weight.to(self.hidden.dtype).T
        if self.bias is not None:
            logits = logits + self.bias
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


@dataclass(frozen=True)
class TeacherBatch:
    """One teacher's view of the student's batch.

    Cross-tokenizer: everything is set. Same vocabulary: `projection` is None, positions are the student's, and all but
    `logits` may be None. Chunk ids are of the token at that position (not shifted), -1 outside chunks.
    """

    logits: Tensor | HiddenLogits | TopKLogits
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
class LossOutput:
    """The loss of a batch and what to log about it."""

    loss: Tensor
    """0-dim, differentiable."""
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    """kl_loss (nats, aggregated KD), ce_loss (nats per token), kl_loss_scale, accuracy (0..1), num_valid_samples; per teacher i: kl_loss_t{i},
    weight_t{i}, num_valid_chunks_t{i} (count), kl_common_t{i}, l1_uncommon_t{i} (gold, h_kl), proj_accuracy_t{i}; selected_teacher."""
