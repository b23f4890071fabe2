"""What goes into the losses and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from xtoken_core.losses.logits import Logits, LogitsForm, as_form

if TYPE_CHECKING:
    from xtoken_core.projection import Projection


@dataclass(frozen=True)
class StudentBatch:
    """The student's side of a batch."""

    logits: LogitsForm
    """[B, T_s, V_s] float32, bfloat16, float16 or float64."""
    input_ids: Tensor
    """[B, T_s] int64."""
    token_mask: Tensor
    """[B, T_s], nonzero where the token counts as a target of CE and of the same-vocabulary KD."""
    sample_mask: Tensor
    """[B], nonzero where the sample counts."""

    @classmethod
    def of(cls, logits: Logits, input_ids: Tensor, token_mask: Tensor, sample_mask: Tensor) -> StudentBatch:
        """From logits of any kind."""
        return cls(as_form(logits), input_ids, token_mask, sample_mask)


@dataclass(frozen=True)
class TeacherBatch:
    """One teacher's view of the student's batch.

    Cross-tokenizer: everything is set. Same vocabulary: `projection` is None, positions are the student's, and all but
    `logits` may be None; a `token_mask` of its own says where it teaches. Chunk ids are of the token at that position (not shifted), -1 outside chunks.
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
    """partition_kl | p_kl | h_kl | gold; None: the loss spec's mode."""
    token_bytes: Tensor | None = None
    """[B, T_t] int: bytes of each token; only read with score_unit: byte."""
    taught: Tensor | None = None
    """[B] bool: the samples that it teaches; on others nothing of it counts. None: all."""


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
    untaught: Tensor | None = None
    """0-dim, no gradient: the part of `ce` that is of samples that no teacher teaches; None: there are none."""
