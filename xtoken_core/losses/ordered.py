"""Logits with their columns in the order of cells, where the mass of a cell is a sum of neighbours.

The vocabulary is the first dimension, [V, rows]: PyTorch sums neighbours along the first dimension only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken_core.losses.logits import HiddenLogits, LogitsForm
from xtoken_core.losses.partition import CellOrder
from xtoken_core.losses.selection import FLOOR


@dataclass(frozen=True)
class OrderedLogits:
    """One side's logits, columns in the order of cells."""

    form: LogitsForm
    order: CellOrder
    following: Tensor
    """[B, T] int64: the place of the token that each row predicts."""

    @classmethod
    def of(cls, form: LogitsForm, order: CellOrder, following: Tensor) -> OrderedLogits:
        """From logits [B, T, V] and the token [B, T] that each row predicts."""
        if isinstance(form, HiddenLogits):
            bias = None if form.bias is None else form.bias.detach()[order.ids]
            weight = form.weight.detach()[order.ids].to(form.hidden.dtype)
            form = replace(form, hidden=form.hidden.detach(), weight=weight, bias=bias)
        return cls(form, order, order.place[following])

    def logits(self, tile: slice) -> Tensor:
        """[V, rows] of the samples of a tile."""
        if not isinstance(self.form, HiddenLogits):
            return self.form.over_positions(lambda x: x.detach()[tile]).dense().flatten(0, 1).T[self.order.ids]
        logits = self.form.weight @ self.form.hidden[tile].flatten(0, 1).T
        if self.form.bias is not None:
            logits += self.form.bias.to(logits.dtype)[:, None]
        logits *= self.form.scale
        return logits if self.form.softcap is None else self.form.softcap * (logits / self.form.softcap).tanh()

    def masses(self, probabilities: Tensor) -> Tensor:
        """[cells, n]: the log of each cell's mass in n columns of probabilities [V, n]; masses below the floor count as that."""
        kept = probabilities[: len(self.order.cell)]
        return torch.segment_reduce(kept, "sum", lengths=self.order.sizes, axis=0, unsafe=True).clamp(min=FLOOR).log()

    def log_probs(self, probabilities: Tensor, tile: slice) -> Tensor:
        """[rows]: log-probability of the token that each row of a tile predicts, with the same floor."""
        return probabilities.gather(0, self.following[tile].reshape(1, -1))[0].clamp(min=FLOOR).log()

    def gradient(
        self, probabilities: Tensor, tile: slice, first: Tensor, mass: Tensor, by_mass: Tensor, by_tokens: Tensor
    ) -> Tensor:
        """[V, rows]: the gradient by the logits, written over the probabilities.

        d log M_c / d z_j = p_j / M_c within the cell c, less p_j everywhere; d log p_i / d z_j = 1 at i, less p_j everywhere.
        A mass at the floor does not move.

        Args:
            probabilities: [V, rows] of a tile.
            tile: its samples.
            first: [n] the rows of the tile whose cells are compared.
            mass: [cells, n] as `masses` gave them.
            by_mass: [cells, n] the gradient by them.
            by_tokens: [rows] the gradient by `log_probs`.
        """
        by_mass = by_mass.masked_fill(mass <= math.log(FLOOR), 0)
        everywhere = by_tokens.index_add(0, first, by_mass.sum(0))
        within = probabilities.new_zeros(len(mass), probabilities.shape[1]).index_copy_(1, first, by_mass * (-mass).exp())
        kept = len(self.order.cell)
        probabilities[:kept] *= within.index_select(0, self.order.cell) - everywhere
        probabilities[kept:] *= -everywhere
        return probabilities.scatter_add_(0, self.following[tile].reshape(1, -1), by_tokens[None])


def probabilities_of(logits: Tensor) -> Tensor:
    """[V, rows]: softmax over the first dimension, in float32 at least; PyTorch's own is a hundred times slower on GPUs."""
    shifted = logits.to(torch.promote_types(logits.dtype, torch.float32)) - logits.amax(0)
    return shifted.exp_().div_(shifted.sum(0))
