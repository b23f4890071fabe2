"""A projection matrix whose weights are trained with the student."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from xtoken_core.projection import Projection


class LearnableProjection(nn.Module):
    """Trains the weights of W's nonzeros, each row a softmax over its own; indices and empty rows stay (X-Token, arXiv 2605.21699).

    The gradient comes through p_kl alone: gold and h_kl read W only to pair the vocabularies.
    """

    indices: Tensor
    exact: Tensor | None

    def __init__(self, projection: Projection):
        super().__init__()
        nonzero = (projection.indices >= 0) & (projection.weights > 0)
        self.teacher_vocab_size, self.cells = projection.teacher_vocab_size, projection.cells
        self.register_buffer("indices", projection.indices.masked_fill(~nonzero, -1), persistent=False)
        self.register_buffer("exact", projection.exact, persistent=False)
        self.log_weights = nn.Parameter(projection.weights.detach().masked_fill(~nonzero, 1).log())
        """[V_s, k]: the softmax's logits; those outside W's nonzeros are never read."""
        self._tables: dict[torch.device, dict[Any, Any]] = {}

    def forward(self) -> Projection:
        """W with differentiable weights [V_s, k], and the tables of its entries from call to call."""
        tables = self._tables.setdefault(self.indices.device, {})
        outside = self.indices < 0
        weights = self.log_weights.masked_fill(outside, torch.finfo(self.log_weights.dtype).min).softmax(1)
        return Projection(self.indices, weights.masked_fill(outside, 0), self.teacher_vocab_size, self.exact, self.cells, tables)

    def projection(self) -> Projection:
        """W as it stands, detached: to save."""
        learned = self()
        return replace(learned, weights=learned.weights.detach())
