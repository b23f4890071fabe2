"""The losses in vectorised PyTorch with autograd: the path on CPU and where Triton is missing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xtoken_core.losses.types import Coefficients, HiddenLogits, TeacherBatch, TermSums
from xtoken_core.spec import LossSpec


def term_sums(
    student: Tensor | HiddenLogits,
    input_ids: Tensor,
    token_mask: Tensor,
    sample_mask: Tensor,
    teachers: Sequence[TeacherBatch],
    spec: LossSpec,
    coefficients: Coefficients | None = None,
) -> TermSums:
    """CE and each teacher's KD over one batch, as sums that add up over any split of the batch into samples.

    Everything that is decided over a global batch (counts, weights, the selected teacher, the scale) comes before and after,
    in `aggregation`; a term here depends on its own samples alone. (`topk_scope: batch` chooses columns over the samples given.)

    Args:
        student: [B, T_s, V_s] logits, float32, bfloat16, float16 or float64, or what forms them.
        input_ids: [B, T_s] int64.
        token_mask: [B, T_s], nonzero where the token counts as a target of CE and of the same-vocabulary KD.
        sample_mask: [B], nonzero where the sample counts.
        teachers: only those whose KD is wanted, as `selection.resolve_teachers` returns them: `mode` is set for cross-tokenizer
            teachers and None for others, `input_ids` and `token_mask` are set, logits have exactly the columns of the vocabulary.
            AveragedLogits are compared over the full vocabulary, whatever `spec.vocab_topk`.
        spec: read for temperature, chunk_distribution, topk_scope, vocab_topk, uncommon_topk, reverse_kl, exact_match_only.
        coefficients: factors of the sums in the loss, where known. An implementation may then form the gradient of `total` while it
            runs forward, and only `total` is differentiable. Without, `ce` and `kd` are, each with any upstream gradient.

    Returns:
        TermSums in float32, or float64 if the student's logits are. Differentiable with respect to the student's logits (or hidden
        states, lm_head weight and bias) and, through p_kl, to `projection.weights`; never to the teachers' logits. Computed in float32 at
        least: logits of lower precision are upcast, gradients are rounded once to the dtype of their tensor.
    """
    raise NotImplementedError
