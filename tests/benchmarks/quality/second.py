"""A second stage of partition_kl, on trial: what follows the cell.

Where the student writes a cell's bytes as a token of its own, its next row tells how the text goes on; the teacher has told that already, by
which of the cell's tokens it expects. Both sides see the event {the text goes on with token f, for every f that some teacher token of the
cell goes on with; anything else}.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xtoken_core.losses import HiddenLogits, TeacherBatch
from xtoken_core.losses.types import StudentBatch
from xtoken_core.partition import Partition
from xtoken_core.tokenization import TokenTable

ROWS = 512
"""Rows at a time."""
SMALLEST = 1e-6


def continuations(
    student: PreTrainedTokenizerBase, student_table: TokenTable, teacher_table: TokenTable, cells: Partition
) -> np.ndarray:
    """int32 [V_t]: of each teacher token, as the student writes it, the second token, where the first is the cell's bytes; else -1."""
    own_cell, cell = cells.student.numpy(), cells.teacher.numpy()
    texts = [token.decode("utf-8", "replace") for token in teacher_table.tokens]
    found = np.full(len(texts), -1, np.int32)
    written = student(texts, add_special_tokens=False)["input_ids"]
    for i, ids in enumerate(written):
        if cell[i] >= 0 and len(ids) > 1 and own_cell[ids[0]] == cell[i] and "\ufffd" not in texts[i]:
            found[i] = ids[1]
    return found


@dataclass(frozen=True)
class SecondStage:
    """The groups of teacher tokens by (cell, continuation)."""

    cells: Partition
    group: Tensor
    """[V_t] int64: G for none."""
    group_cell: Tensor
    """[G]."""
    group_token: Tensor
    """[G]: the student token that it goes on with."""

    @classmethod
    def of(cls, cells: Partition, following: Tensor) -> SecondStage:
        """following: of `continuations`."""
        key = torch.where(following >= 0, cells.teacher * 2**20 + following, -1)
        kept, group = key.unique(return_inverse=True)
        kept, group = kept[1:], group - 1  # the first is -1
        return cls(cells, torch.where(group < 0, len(kept), group), kept // 2**20, kept % 2**20)

    def loss(self, student: StudentBatch, teacher: TeacherBatch) -> Tensor:
        """Sum over the second rows of a batch of the KL between both sides."""
        own, other, cell = self._rows(student, teacher)
        form, theirs = student.logits, teacher.logits
        assert isinstance(form, HiddenLogits) and isinstance(theirs, HiddenLogits)
        total = form.hidden.new_zeros((), dtype=torch.float32)
        for s, t, c in zip(own.split(ROWS), other.split(ROWS), cell.split(ROWS)):
            with torch.no_grad():
                p = (theirs.hidden.flatten(0, 1)[t] @ theirs.weight.T).float().softmax(-1)
                whole = p.new_zeros(len(c), self.cells.num_cells + 1).index_add_(1, self._cell_column, p)
                mass = p.new_zeros(len(c), len(self.group_cell) + 1).index_add_(1, self.group, p)[:, :-1]
                inside = self.group_cell[None] == c[:, None]
                target = torch.where(inside, mass / whole.gather(1, c[:, None]).clamp(min=1e-30), 0.0)
                rest = (1 - target.sum(1)).clamp(min=SMALLEST)
            q = (form.hidden.flatten(0, 1)[s] @ form.weight.to(form.dtype).T).float().log_softmax(-1)
            row, group = target.nonzero(as_tuple=True)
            logs, weight = q[row, self.group_token[group]], target[row, group]
            taken = q.new_zeros(len(c)).index_add(0, row, logs.exp())
            total = total + (weight * (weight.log() - logs)).sum()
            total = total + (rest * (rest.log() - (1 - taken).clamp(min=SMALLEST).log())).sum()
        return total

    @property
    def _cell_column(self) -> Tensor:
        return torch.where(self.cells.teacher < 0, self.cells.num_cells, self.cells.teacher)

    def _rows(self, student: StudentBatch, teacher: TeacherBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Flat: the student's second rows, the teacher's first rows of the same chunks, and the cells."""
        assert teacher.student_chunk_id is not None and teacher.teacher_chunk_id is not None and teacher.chunk_exact is not None
        own, other, good = teacher.student_chunk_id, teacher.teacher_chunk_id, teacher.chunk_valid & teacher.chunk_exact
        begins = (own >= 0) & (own != own.roll(1, 1))
        begins[:, 0] = False
        goes_on = begins & (own == own.roll(-1, 1))
        goes_on[:, -1] = False
        b, t = goes_on.nonzero(as_tuple=True)  # the row of the first token predicts the second
        chunk = own[b, t]
        starts = (other >= 0) & (other != other.roll(1, 1))
        starts[:, 0] = False
        place = torch.full((*good.shape,), -1, device=own.device)
        tb, tt = starts.nonzero(as_tuple=True)
        place[tb, other[tb, tt]] = tt
        cell = self.cells.student[student.input_ids[b, t]]
        u = place[b, chunk]
        first = teacher.input_ids[b, u.clamp(min=0)]
        kept = (u > 0) & good[b, chunk] & (cell >= 0) & (self.cells.teacher[first] == cell)
        kept &= torch.isin(cell, self.group_cell)
        b, t, u, cell = b[kept], t[kept], u[kept], cell[kept]
        return b * own.shape[1] + t, b * other.shape[1] + u - 1, cell
