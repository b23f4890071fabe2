"""partition_kl of a teacher's scores at τ = 1, from the log-probabilities that cross-entropy has already.

Only what the scores list is looked up: the tokens of k cells a row, and not the masses of all cells. What the student leaves to the others is the
difference from what it gives to all, or their own sum where the difference would be small and so inexact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken_core.losses.cell_scores import CellScores
from xtoken_core.losses.partition import CellOrder, cell_order, chunk_sums, compared_chunks, realised_part
from xtoken_core.losses.selection import FLOOR
from xtoken_core.losses.types import StudentBatch, TeacherBatch
from xtoken_core.spec import LossSpec

_SMALL = 1 / 32
"""Mass of the others below which they are added up one by one."""
_FEW = 1 / 16
"""Share of tokens without a cell up to which their masses are looked up rather than left out of a sum."""


def partition_kl(log_probs: Tensor, tokens: Tensor, student: StudentBatch, teacher: TeacherBatch, spec: LossSpec) -> Tensor:
    """As `partition_tiles.partition_kl`, of a teacher's scores and at τ = 1; differentiable with respect to what it is given.

    Args:
        log_probs: [B, T, V] of the student.
        tokens: [B, T] those of the tokens that the rows predict.
        student: read for ids and masks.
        teacher: its logits are `CellScores`.
        spec: read for reverse_kl.
    """
    scores, projection = teacher.logits, teacher.projection
    assert isinstance(scores, CellScores) and projection is not None
    chunks = compared_chunks(student, teacher, spec)
    order = projection.table(cell_order, "student", log_probs.shape[2])
    listed = scores.indices.flatten(0, 1)[chunks.teacher_row].long()
    told = scores.values.flatten(0, 1)[chunks.teacher_row].to(log_probs.dtype)
    own = _Rows(log_probs.flatten(0, 1), chunks.student_row, order).masses(listed)
    every = told
    if own.shape[1] > told.shape[1]:
        every = torch.cat([told, scores.rest.flatten()[chunks.teacher_row, None].to(told.dtype)], 1)
    s, t = own.log_softmax(1), every.log_softmax(1)
    target, other = (s, t) if spec.reverse_kl else (t, s)
    first = (target.exp() * (target - other)).sum()

    count = len(chunks.cell)
    shares = (
        chunk_sums(tokens.flatten(), chunks.student_chunk, count) - own[:, 0],
        chunk_sums(scores.realised.flatten().to(told.dtype), chunks.teacher_chunk, count) - told[:, 0],
    )
    mass = s[:, 0] if spec.reverse_kl else told[:, 0] - scores.total.flatten()[chunks.teacher_row].to(told.dtype)
    return first + realised_part(*shares, mass, chunks.realised, spec.reverse_kl)


@dataclass(frozen=True)
class _Rows:
    """The student's rows of n chunks."""

    log_probs: Tensor
    """[B * T, V]."""
    rows: Tensor
    """[n] int64."""
    order: CellOrder

    def masses(self, listed: Tensor) -> Tensor:
        """[n, k + 1]: logs of the masses of cells listed [n, k], and of all others together; [n, k] where all are listed."""
        count, k = listed.shape
        slot, token = self._tokens(listed.flatten())
        p = self._at(slot // k, token).exp()
        mass = p.new_zeros(count * k).index_add(0, slot, p).view(count, k)
        if k == len(self.order.sizes):
            return mass.clamp(min=FLOOR).log()
        rest = self._others(mass, (slot // k, token))
        return torch.cat([mass, rest[:, None]], 1).clamp(min=FLOOR).log()

    def _at(self, row: Tensor, token: Tensor) -> Tensor:
        """[m]: log-probabilities of tokens [m] in the rows numbered `row` [m]."""
        vocab = self.log_probs.shape[1]
        return self.log_probs.flatten().gather(0, self.rows[row] * vocab + token)

    def _tokens(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Of cells [m] all tokens: which of the m each belongs to, and its id."""
        sizes, starts = self.order.sizes[cells], (self.order.sizes.cumsum(0) - self.order.sizes)[cells]
        slot = torch.repeat_interleave(torch.arange(len(cells), device=cells.device), sizes)
        place = torch.arange(len(slot), device=cells.device) - (sizes.cumsum(0) - sizes)[slot]
        return slot, self.order.ids[starts[slot] + place]

    def _others(self, mass: Tensor, listed: tuple[Tensor, Tensor]) -> Tensor:
        """[n]: the mass of the cells that are not listed, beside those that are [n, k], whose tokens are `listed` (row, id)."""
        outside = self.order.ids[len(self.order.cell) :]
        if len(outside) > _FEW * len(self.order.ids):
            return self._summed(torch.arange(len(mass), device=mass.device), listed, outside)
        n, m = len(mass), len(outside)
        places = torch.arange(n, device=mass.device).repeat_interleave(m), outside.repeat(n)
        without = self._at(*places).exp().view(n, m).sum(1, dtype=torch.float64)
        rest = (1 - mass.sum(1, dtype=torch.float64) - without).to(mass.dtype)
        small = (rest.detach() < _SMALL).nonzero()[:, 0]
        return rest if not len(small) else rest.index_copy(0, small, self._summed(small, listed, outside))

    def _summed(self, some: Tensor, listed: tuple[Tensor, Tensor], outside: Tensor) -> Tensor:
        """[m]: the same of some of the rows, added up over the tokens that are neither listed nor without a cell."""
        kept = torch.ones(len(self.rows), dtype=torch.bool, device=some.device).index_fill(0, some, False).logical_not()
        number = torch.cumsum(kept, 0) - 1
        row, token = (x[kept[listed[0]]] for x in listed)
        p = self.log_probs.index_select(0, self.rows[some]).exp()
        left = torch.ones_like(p).index_fill_(1, outside, 0)
        left[number[row], token] = 0
        return (p * left).sum(1)
