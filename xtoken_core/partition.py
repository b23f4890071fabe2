"""Cells: the finest partition of the next text that two vocabularies can both see.

C is the set of byte strings that are ordinary tokens of both vocabularies. The cell of a token, of either side, is the longest element of C
that its bytes begin with; a special token's is that of the token that `role_pairs` gives. For tokenizers that take the
longest piece, the cell of the next token is a function of the text alone, so the probabilities of the cells are those of one event, whichever
side they are summed over. A byte pair encoding does not always take the longest: where it does not, the first tokens of the two sides lie in
different cells, and a teacher that is right contradicts the text. The cells of such tokens are joined (`seen_together`, `join_cells`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xtoken_core.first_tokens import FirstTokens
from xtoken_core.tokenization import TokenTable, role_pairs

JOINED_SHARE = 0.05
"""Two cells are joined in which a chunk's two first tokens lie, one each, in this share of the cases in which the rarer of them is seen."""
LEAST_CASES = 2
"""And in so many at least: of what 1,600 rows of 512 tokens join by two cases, other rows join 92 % too; by one, 83 %."""
LEAST_SHARE = 2.5e-7
"""And in this share of all chunks: what is rarer teaches next to nothing, and chance would chain ever more cells of a large text together."""


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


def join_cells(partition: Partition, pairs: Iterable[tuple[int, int]]) -> Partition:
    """The same with the two cells of each pair made one; cells keep their order, by the first of those that became one."""
    parent = list(range(partition.num_cells))

    def root(cell: int) -> int:
        while parent[cell] != cell:
            parent[cell] = parent[parent[cell]]
            cell = parent[cell]
        return cell

    for a, b in pairs:
        first, second = sorted((root(a), root(b)))
        parent[second] = first
    kept, number = torch.tensor([root(cell) for cell in range(partition.num_cells)]).unique(return_inverse=True)
    number = torch.cat([number, torch.tensor([-1])])  # -1 stays
    return Partition(number[partition.student], number[partition.teacher], len(kept))


def seen_together(partition: Partition, first: FirstTokens) -> list[tuple[int, int]]:
    """Pairs of cells, for `join_cells`, that text has shown to be one: its chunks' first tokens lie in both."""
    own, other = _first_cells(partition, first)
    apart = (own != other) & (own >= 0) & (other >= 0)
    low, high = np.minimum(own, other)[apart], np.maximum(own, other)[apart]
    keys, place = np.unique(low * partition.num_cells + high, return_inverse=True)
    together = np.zeros(len(keys), np.int64)
    np.add.at(together, place, first.count[apart])
    seen = np.zeros(partition.num_cells, np.int64)
    for cells, counted in ((own, own >= 0), (other, (other >= 0) & (other != own))):
        np.add.at(seen, cells[counted], first.count[counted])
    low, high = keys // partition.num_cells, keys % partition.num_cells
    least = max(LEAST_CASES, LEAST_SHARE * first.count.sum())
    joined = (together >= least) & (together >= JOINED_SHARE * np.minimum(seen[low], seen[high]))
    return list(zip(low[joined].tolist(), high[joined].tolist()))


def share_apart(partition: Partition, first: FirstTokens) -> float:
    """Of the chunks, the share whose two first tokens lie in different cells."""
    own, other = _first_cells(partition, first)
    apart = (own != other) & (own >= 0) & (other >= 0)
    return float(first.count[apart].sum() / max(first.count.sum(), 1))


def _first_cells(partition: Partition, first: FirstTokens) -> tuple[np.ndarray, np.ndarray]:
    return partition.student.numpy()[first.student], partition.teacher.numpy()[first.teacher]
