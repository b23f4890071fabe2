"""What the losses look up in W: its nonzeros as a list, and the pairs of gold and h_kl. Made once; the projection keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from xtoken_core.projection import Projection

H_KL_THRESHOLD = 0.6
"""Least weight at which a row of W makes a common pair of h_kl."""


@dataclass(frozen=True)
class Entries:
    """The nonzeros of W as a list, ordered by student token."""

    student: Tensor
    """[n] int64."""
    teacher: Tensor
    """[n] int64."""
    slot: Tensor
    """[n] int64: where its weight is in `projection.weights.flatten()`."""
    columns: int
    """One more than the largest teacher id."""


@dataclass(frozen=True)
class CommonPairs:
    """The vocabulary split of gold and h_kl."""

    student: Tensor
    """[n] int64 student ids, ascending; paired with `teacher`."""
    teacher: Tensor
    """[n] int64 teacher ids, each once."""
    uncommon_student: Tensor
    """Ascending ids of the student that are in no pair."""
    uncommon_teacher: Tensor
    """Ascending ids of the teacher that are in no pair."""


def projection_entries(projection: Projection, student_vocab: int) -> Entries:
    """W's nonzeros in its first `student_vocab` rows."""
    return projection.table(_entries, student_vocab)


def _entries(projection: Projection, student_vocab: int) -> Entries:
    flat = projection.indices[:student_vocab].flatten()
    slot = (flat >= 0).nonzero().squeeze(1)
    teacher = flat[slot].long()
    columns = int(teacher.max()) + 1 if teacher.numel() else 0
    return Entries(slot // projection.indices.shape[1], teacher, slot, columns)


def common_pairs(projection: Projection, mode: str, student_vocab: int, teacher_vocab: int) -> CommonPairs:
    """The pairs of gold (exact rows: one entry, of weight 1; on collision the lowest student id) or of h_kl (rows whose largest
    weight is at least 0.6; on collision the largest weight, then the lowest id), and what is left over on both sides.

    Where the projection has an `exact` mask, gold takes it: a repeated id that was summed also looks like one entry of 1.
    Source: NeMo-RL's gold loss and its `xtoken_loss` variant; X-Token, arXiv 2605.21699.
    """
    return projection.weighted_table(_common_pairs, mode, student_vocab, teacher_vocab)


def _common_pairs(projection: Projection, mode: str, student_vocab: int, teacher_vocab: int) -> CommonPairs:
    indices = projection.indices[:student_vocab]
    weights = torch.where(indices >= 0, projection.weights[:student_vocab].detach(), 0)
    weight, slot = weights.max(1)
    if mode == "h_kl":
        paired = weight >= H_KL_THRESHOLD
    elif projection.exact is not None:
        paired = projection.exact[:student_vocab].bool() & (weight > 0)
        weight = torch.ones_like(weight)
    else:
        paired = (weight == 1) & ((weights > 0).sum(1) == 1)
    student = paired.nonzero().squeeze(1)
    student = student[weight[student].sort(descending=True, stable=True).indices]  # best first, then lowest id
    teacher = indices.gather(1, slot[:, None]).squeeze(1)[student].long()
    rank = torch.arange(student.numel(), device=student.device)
    best = torch.full((teacher_vocab,), student.numel(), device=student.device).scatter_reduce(0, teacher, rank, "amin")
    wins = best[teacher] == rank
    student, order = student[wins].sort()
    teacher = teacher[wins][order]
    return CommonPairs(student, teacher, _others(student, student_vocab), _others(teacher, teacher_vocab))


def _others(ids: Tensor, vocab: int) -> Tensor:
    rest = torch.ones(vocab, dtype=torch.bool, device=ids.device)
    rest[ids] = False
    return rest.nonzero().squeeze(1)
