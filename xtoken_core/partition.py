"""Cells: the finest partition of the next text that two vocabularies can both see.

C is the set of byte strings that are ordinary tokens of both vocabularies. The cell of a token, of either side, is the longest element of C
that its bytes begin with; a special token's is that of the token that `role_pairs` gives. For tokenizers that take the
longest piece, the cell of the next token is a function of the text alone, so the probabilities of the cells are those of one event, whichever
side they are summed over.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken_core.tokenization import TokenTable, role_pairs


@dataclass(frozen=True, eq=False)
class Partition:
    """The cell of every token of a student's and a teacher's vocabulary."""

    student: Tensor
    """int64 [V_s]: cells 0..num_cells-1; -1: in none (a special token without a counterpart, bytes that begin with no element of C)."""
    teacher: Tensor
    """int64 [V_t]."""
    num_cells: int

    @classmethod
    def of(cls, student: Tensor | None, teacher: Tensor | None) -> Partition | None:
        """The cells of two vocabularies as they are stored; None where there are none."""
        if student is None or teacher is None:
            return None
        return cls(student.long(), teacher.long(), int(max(student.max(), teacher.max())) + 1)

    def digest(self) -> str:
        """Of the cells of both vocabularies."""
        content = hashlib.sha256(str(self.num_cells).encode())
        for side in (self.student, self.teacher):
            content.update(side.cpu().numpy().astype("<i4").tobytes())
        return content.hexdigest()[:16]

    def to(self, device: torch.device | str) -> Partition:
        """The same cells on another device."""
        return Partition(self.student.to(device), self.teacher.to(device), self.num_cells)


def build_partition(student: TokenTable, teacher: TokenTable) -> Partition:
    """The cells of two vocabularies; tokens that stand for no text and have no common role are in none.

    Where one token of the teacher fills the roles of several of the student's (`<|endoftext|>` as BOS and EOS), they share its cell: by
    what the teacher gives it no one of them could be told from the others.
    """
    shared = _ordinary_bytes(student) & _ordinary_bytes(teacher)
    number = {token: cell for cell, token in enumerate(sorted(shared))}
    cells = [[_longest_prefix(token, number) for token in table.tokens] for table in (student, teacher)]
    count = len(number)
    for own, other in role_pairs(student, teacher).items():
        if cells[1][other] == -1:
            cells[1][other] = count
            count += 1
        if cells[0][own] == -1 and cells[1][other] >= len(number):
            cells[0][own] = cells[1][other]
    return Partition(torch.tensor(cells[0]), torch.tensor(cells[1]), count)


def _ordinary_bytes(table: TokenTable) -> set[bytes]:
    return {table.tokens[i] for i in table.ordinary.nonzero()[0].tolist()} - {b""}


def _longest_prefix(token: bytes, number: dict[bytes, int]) -> int:
    for end in range(len(token), 0, -1):
        cell = number.get(token[:end])
        if cell is not None:
            return cell
    return -1
