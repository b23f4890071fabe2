"""How sure a teacher is of its own tokens: what weights or selects teachers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from xtoken_core.errors import InputError
from xtoken_core.losses.logits import Logits, as_form
from xtoken_core.losses.selection import next_token_ids, next_token_mask
from xtoken_core.spec import LossSpec

ROWS = 512
"""Rows of logits that are in float32 at a time."""

BITS = LossSpec(weight_metric="ce", score_unit="byte")
"""What asks `teacher_scores` for the nats of text and its bytes."""


def score_metric(spec: LossSpec) -> Literal["ce", "entropy", "max_prob"] | None:
    """What the spec wants to know of each teacher; None: nothing."""
    return "ce" if spec.aggregation == "select_teacher" else spec.weight_metric


@torch.no_grad()
def teacher_scores(
    logits: Logits,
    input_ids: Tensor,
    token_mask: Tensor,
    sample_mask: Tensor,
    spec: LossSpec,
    token_bytes: Tensor | None = None,
) -> Tensor:
    """One teacher's score over one batch, as a sum and the count to divide it by; both add up over batches and ranks.

    ce: sum of -log p over the next tokens, nats, and their number (`score_unit: byte`: their bytes). entropy, max_prob: sum over
    every valid position, of nats or of probabilities, and the number of positions. Temperature 1. Masked tokens and samples are
    left out. Holds `ROWS` rows of the logits in float32 at a time.

    Args:
        logits: [B, T, V] of the teacher, columns of padding dropped.
        input_ids: [B, T] the teacher's tokens.
        token_mask: [B, T], nonzero where the token counts.
        sample_mask: [B], nonzero where the sample counts.
        spec: read for weight_metric, aggregation and score_unit.
        token_bytes: [B, T] bytes of each token; needed with `score_unit: byte`.

    Returns:
        [2] float64; zeros where the spec needs no scores.
    """
    metric = score_metric(spec)
    result = torch.zeros(2, dtype=torch.float64, device=logits.device)
    if metric is None:
        return result
    form = as_form(logits)
    if not form.complete:
        raise InputError(f"{metric} of a teacher needs its full logits, not their top k")
    if metric == "ce":
        counted, targets = next_token_mask(token_mask, sample_mask), next_token_ids(input_ids)
    else:
        counted, targets = (token_mask != 0) & (sample_mask != 0)[:, None], input_ids
    units = torch.ones_like(targets)
    if spec.score_unit == "byte":
        if token_bytes is None:
            raise InputError("score_unit: byte needs the token_bytes of every teacher")
        units = next_token_ids(token_bytes)
    dtype = torch.promote_types(form.dtype, torch.float32)
    for rows in counted.nonzero().split(ROWS):
        b, t = rows.unbind(1)
        log_probs = form.at(b, t).to(dtype).log_softmax(-1)
        if metric == "ce":
            values = -log_probs.gather(1, targets[b, t][:, None])
        elif metric == "entropy":
            values = -(log_probs.exp() * log_probs).sum(-1)
        else:
            values = log_probs.amax(-1).exp()
        result[0] += values.sum(dtype=torch.float64)
        result[1] += units[b, t].sum()
    return result
