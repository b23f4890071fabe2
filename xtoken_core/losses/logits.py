"""The forms in which logits may be at hand (one more, masses of cells, is in `cell_scores`). What differs between them is a method here, never a test elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from xtoken_core.errors import InputError


class LogitsForm(ABC):
    """Logits [B, T, V] in one of the forms in which they may be at hand."""

    complete: ClassVar[bool] = True
    """Whether the logit of every column is known."""
    of_cells: ClassVar[bool] = False
    """Whether masses of cells are known in place of logits."""
    whole: ClassVar[bool] = False
    """Whether a student of the same vocabulary is always compared over all columns, never over K."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(B, T, V)."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the logits are made of: of a student the inputs that carry gradient. The first has their device and dtype."""

    @abstractmethod
    def over_positions(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with `change` made to every tensor that has positions [B, T, ...]."""

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        assert self.tensors[0] is not None
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits, as `dense` and `at` give them."""
        assert self.tensors[0] is not None
        return self.tensors[0].dtype

    def at(self, b: int | Tensor, t: slice | Tensor, columns: Tensor | None = None) -> Tensor:
        """[n, k]: the rows that `[b, t]` picks of [B, T], at some columns (None: all). Of logits not formed yet, no others are formed."""
        raise InputError("the full logits are needed, not their top k")

    def dense(self) -> Tensor:
        """The logits [B, T, V]."""
        raise InputError("the full logits are needed, not their top k")

    def cut(self, vocab: int) -> LogitsForm:
        """The first `vocab` columns."""
        raise InputError("the full logits are needed, not their top k")

    def maxima(self, b: int, t: slice | Tensor) -> Tensor:
        """[V]: the largest logit of each column over rows t of sample b, without gradient; -inf where no row has it."""
        rows = self.at(b, t).detach()
        return rows.amax(0) if rows.shape[0] else rows.new_full(rows.shape[1:], -torch.inf)


@dataclass(frozen=True)
class DenseLogits(LogitsForm):
    """Logits that lie in memory."""

    values: Tensor
    """[B, T, V]."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, V)."""
        b, t, v = self.values.shape
        return b, t, v

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The logits."""
        return (self.values,)

    def over_positions(self, change: Callable[[Tensor], Tensor]) -> DenseLogits:
        """See `LogitsForm`."""
        return DenseLogits(change(self.values))

    def at(self, b: int | Tensor, t: slice | Tensor, columns: Tensor | None = None) -> Tensor:
        """See `LogitsForm`."""
        rows = self.values[b, t]
        return rows if columns is None else rows.index_select(1, columns)

    def dense(self) -> Tensor:
        """The logits [B, T, V]."""
        return self.values

    def cut(self, vocab: int) -> DenseLogits:
        """See `LogitsForm`."""
        return DenseLogits(self.values[..., :vocab])


@dataclass(frozen=True)
class HiddenLogits(LogitsForm):
    """Logits that are not there yet: final hidden states and the lm_head that turns them into logits.

    The logits are `softcap(scale * (hidden @ weight.T + bias))`, with softcap(x) = cap * tanh(x / cap) where a cap is set
    (Gemma's final_logit_softcapping; Granite's and Cohere's logit scale). Losses that can, form them one tile at a time.
    """

    hidden: Tensor
    """[B, T, D], after the final norm."""
    weight: Tensor
    """[V, D]: rows of padding beyond the tokenizer's ids already dropped."""
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, V)."""
        return self.hidden.shape[0], self.hidden.shape[1], self.weight.shape[0]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Hidden states, weight and bias."""
        return self.hidden, self.weight, self.bias

    def over_positions(self, change: Callable[[Tensor], Tensor]) -> HiddenLogits:
        """See `LogitsForm`."""
        return replace(self, hidden=change(self.hidden))

    def at(self, b: int | Tensor, t: slice | Tensor, columns: Tensor | None = None) -> Tensor:
        """See `LogitsForm`."""
        weight, bias = self.weight, self.bias
        if columns is not None:
            weight, bias = weight[columns], None if bias is None else bias[columns]
        return replace(self, hidden=self.hidden[b, t], weight=weight, bias=bias).dense()

    def dense(self) -> Tensor:
        """The logits in the dtype of the hidden states."""
        logits = self.hidden @ self.weight.to(self.hidden.dtype).T
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def cut(self, vocab: int) -> HiddenLogits:
        """See `LogitsForm`."""
        return replace(self, weight=self.weight[:vocab], bias=None if self.bias is None else self.bias[:vocab])


@dataclass(frozen=True)
class TopKLogits(LogitsForm):
    """The k largest logits of every position of a teacher with the student's vocabulary."""

    complete: ClassVar[bool] = False
    values: Tensor
    """[B, T, k], in the compute dtype."""
    indices: Tensor
    """[B, T, k] int32 or int64 vocabulary ids."""
    vocab_size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, V)."""
        return self.values.shape[0], self.values.shape[1], self.vocab_size

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Values and indices."""
        return self.values, self.indices

    def over_positions(self, change: Callable[[Tensor], Tensor]) -> TopKLogits:
        """See `LogitsForm`."""
        return replace(self, values=change(self.values), indices=change(self.indices))

    def maxima(self, b: int, t: slice | Tensor) -> Tensor:
        """See `LogitsForm`."""
        values, indices = self.values[b, t].detach(), self.indices[b, t].long()
        return values.new_full((self.vocab_size,), -torch.inf).scatter_reduce(0, indices.flatten(), values.flatten(), "amax")


@dataclass(frozen=True)
class AveragedLogits(LogitsForm):
    """The weighted sum of several teachers' logits over one vocabulary (aggregation: averaged_logits), in float32 at least."""

    whole: ClassVar[bool] = True
    parts: tuple[LogitsForm, ...]
    """Each [B, T, V]."""
    weights: tuple[float, ...]
    """One per part, summing to 1."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, V)."""
        return self.parts[0].shape

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of the parts."""
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 if the parts are."""
        return torch.promote_types(self.parts[0].dtype, torch.float32)

    def over_positions(self, change: Callable[[Tensor], Tensor]) -> AveragedLogits:
        """See `LogitsForm`."""
        return replace(self, parts=tuple(part.over_positions(change) for part in self.parts))

    def at(self, b: int | Tensor, t: slice | Tensor, columns: Tensor | None = None) -> Tensor:
        """See `LogitsForm`."""
        return self._sum(part.at(b, t, columns) for part in self.parts)

    def dense(self) -> Tensor:
        """The averaged logits [B, T, V]."""
        return self._sum(part.dense() for part in self.parts)

    def _sum(self, parts: Iterable[Tensor]) -> Tensor:
        first, *others = (part.to(self.dtype) for part in parts)
        total = first * self.weights[0]
        for logits, weight in zip(others, self.weights[1:], strict=True):
            total = total.add(logits, alpha=weight)
        return total


Logits = Tensor | LogitsForm
"""What may stand for logits [B, T, V]; all have `.shape` and `.device`."""


def as_form(logits: Logits) -> LogitsForm:
    """A tensor as what has the methods of the other forms; those as they are."""
    return DenseLogits(logits) if isinstance(logits, Tensor) else logits
