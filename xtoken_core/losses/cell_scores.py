"""What a teacher says of cells, cut to the likeliest: what partition_kl reads of a teacher that was run once, before the training.

Of a row are known the masses of k cells (among them the cell of the row's own next token) and the mass of all others together. That is a
coarse-graining of the very event that partition_kl compares, {each listed cell, the others}, and its masses are exact: the student's cells are
grouped in the same way, and the loss is a KL of that event. So it is never negative, zero for equal models whatever k, never more than the
loss of the running teacher, grows with k, and is that loss where every cell is listed. The realised chunks' part is that of the running
teacher at any k.

Lists of *tokens* would not be exact: a cell holds tokens that no list has, and their mass would count with the others, in a distribution that the
teacher never had. So the cells must be known when the teacher is scored, which prepared rows fix anyway: they are of one student's tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from xtoken_core.losses.logits import Logits, LogitsForm, as_form
from xtoken_core.losses.ordered import OrderedLogits, probabilities_of
from xtoken_core.losses.partition import CellOrder, order_by_cell
from xtoken_core.losses.selection import next_token_ids
from xtoken_core.partition import Partition

_NUMBERS = 2**26
"""Probabilities that are there at a time while a teacher is cut."""


@dataclass(frozen=True)
class CellScores(LogitsForm):
    """The likeliest cells of every position of a teacher. All masses are logs, of its probabilities at τ = 1 unless it says otherwise."""

    complete: ClassVar[bool] = False
    of_cells: ClassVar[bool] = True
    values: Tensor
    """[B, T, k]: masses of k cells; the first is that of the row's own next token, if it has one."""
    indices: Tensor
    """[B, T, k] int32: these cells, each once."""
    rest: Tensor
    """[B, T]: log Σ mass^(1/τ) of the cells that are not listed, τ the loss's; -inf where there are none."""
    total: Tensor
    """[B, T]: of all cells together; less than 0 by the tokens that have no cell."""
    realised: Tensor
    """[B, T]: log-probability of the row's own next token."""
    num_cells: int
    vocab_size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, V)."""
        return self.values.shape[0], self.values.shape[1], self.vocab_size

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them."""
        return self.values, self.indices, self.rest, self.total, self.realised

    def over_positions(self, change: Callable[[Tensor], Tensor]) -> CellScores:
        """See `LogitsForm`."""
        values, indices, rest, total, realised = map(change, (self.values, self.indices, self.rest, self.total, self.realised))
        return CellScores(values, indices, rest, total, realised, self.num_cells, self.vocab_size)

    def cut(self, vocab: int) -> CellScores:
        """The same: no token is listed, of padding or not."""
        return replace(self, vocab_size=min(vocab, self.vocab_size))

    def cells(self, rows: Tensor, student: Tensor, temperature: float) -> Tensor:
        """[cells, n]: the teacher's masses in n rows, for a comparison with the student's masses [cells, n].

        The mass of the cells that are not listed is spread over them as the student spreads its own. So the sum over all cells is the
        KL of {each listed cell, the others}, in value and in the gradient by the student's masses, in both directions.

        rows: [n] int64, flat.
        """
        at = self.indices.flatten(0, 1)[rows].long().T
        others = (student / temperature).scatter(0, at, -math.inf).logsumexp(0)
        spread = student + temperature * (self.rest.flatten()[rows].to(student.dtype) - others)
        return spread.scatter(0, at, self.values.flatten(0, 1)[rows].to(student.dtype).T)


@dataclass(frozen=True)
class CellCut:
    """Cuts a teacher's logits to the k likeliest cells of each row: what the score step stores, and what a trial of some k reads."""

    cells: Tensor
    """int64 [V]: the cell of each of the teacher's tokens, -1 for none."""
    order: CellOrder
    k: int
    temperature: float
    """Of the loss."""

    @classmethod
    def of(cls, partition: Partition, vocab: int, k: int, temperature: float) -> CellCut:
        """For logits of `vocab` columns; k may be more than there are cells, which is all of them."""
        cells = partition.teacher[:vocab]
        return cls(cells, order_by_cell(cells, partition.num_cells), min(k, partition.num_cells), temperature)

    @torch.no_grad()
    def __call__(self, logits: Logits, input_ids: Tensor) -> CellScores:
        """The scores of logits [B, T, V] of a teacher's tokens [B, T]; some of the rows are in memory at a time."""
        form = as_form(logits)
        samples, length, vocab = form.shape
        following = next_token_ids(input_ids).flatten()
        step = max(1, _NUMBERS // vocab)
        flat = OrderedLogits.of(form.over_positions(lambda x: x.flatten(0, 1)[:, None]), self.order, following[:, None])
        parts = [self._rows(flat, slice(n, n + step), following[n : n + step]) for n in range(0, len(following), step)]
        values, indices, rest, total, realised = (
            torch.cat(column).unflatten(0, (samples, length)) for column in zip(*parts, strict=True)
        )
        return CellScores(values, indices, rest, total, realised, len(self.order.sizes), vocab)

    def _rows(self, flat: OrderedLogits, tile: slice, following: Tensor) -> tuple[Tensor, ...]:
        """`CellScores.tensors` of some rows, flat."""
        probabilities = probabilities_of(flat.logits(tile))
        realised = flat.log_probs(probabilities, tile)
        masses = flat.masses(probabilities).T.contiguous()
        own = self.cells[following]
        first = masses.scatter(1, own.clamp(min=0)[:, None], torch.where(own < 0, masses[:, 0], math.inf)[:, None])
        listed = first.topk(self.k).indices
        rest = (masses / self.temperature).scatter(1, listed, -math.inf).logsumexp(1)
        return masses.gather(1, listed), listed.int(), rest, masses.logsumexp(1), realised
