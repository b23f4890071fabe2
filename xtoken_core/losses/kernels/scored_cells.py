"""The teacher's side of partition_kl where only its scores are there: masses of cells as the kernels of a running teacher leave them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xtoken_core.losses.cell_scores import CellScores
from xtoken_core.losses.kernels.cell_masses import CellSide, Masses


def scored_masses(scores: CellScores, rows: Tensor, student: CellSide) -> Masses:
    """Of the teacher's `rows` [columns], beside the student's side of the tile; cells that are not listed as the student spreads them. τ = 1."""
    table = scores.cells(rows, student.log_cells(), 1.0) / math.log(2)
    at = -1 - torch.arange(len(table), dtype=torch.int32, device=table.device)
    rest = scores.total.flatten()[rows].float() / -math.log(2)
    return Masses(table, table, at, rest, rest, rest, len(rows))
