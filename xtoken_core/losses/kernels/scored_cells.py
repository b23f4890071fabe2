"""The teacher's side of partition_kl where only its scores are there: masses of cells as the kernels of a running teacher leave them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken_core.losses.cell_scores import CellScores
from xtoken_core.losses.kernels.cell_masses import CellSide
from xtoken_core.losses.selection import FLOOR


@dataclass(frozen=True)
class ScoredSide:
    """One tile of a teacher's scores; what `CellSide` has that the comparison reads."""

    mass: Tensor
    """[cells, columns] float32: probabilities; those that are not listed as the student spreads them."""
    kept: Tensor
    """[columns]: the probability of all cells."""
    tokens: Tensor
    """[columns]: log-probability of the token that each column predicts."""
    chunk: Tensor
    """[columns] int64: its realised chunk within the tile; one past the last: none."""

    @classmethod
    def of(cls, scores: CellScores, rows: Tensor, chunk: Tensor, student: CellSide) -> ScoredSide:
        """Of the rows that a tile's columns are, beside the student's side of it; at τ = 1."""
        own = (student.mass[: student.cells] * student.scales()[0]).clamp(min=FLOOR).log()
        mass = scores.cells(rows, own, 1.0).exp()
        return cls(mass, scores.total.flatten()[rows].float().exp(), scores.realised.flatten()[rows].float(), chunk)

    def scales(self) -> Tensor:
        """[2, columns]: as of `CellSide`, of masses that are probabilities."""
        return torch.stack([torch.ones_like(self.kept), 1 / self.kept])

    def log_probs(self) -> Tensor:
        """[columns]: of the tokens that the columns predict."""
        return self.tokens
