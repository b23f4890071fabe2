"""Logits a tile of rows at a time, whether they lie there or are formed from hidden states, and the gradients that go back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.kernels.rows import empty_rows
from xtoken_core.losses.logits import HiddenLogits, LogitsForm


@triton.jit
def _cap_kernel(x, size, scale, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """x <- cap * tanh(scale * x / cap), or scale * x; tanh by exp, whose error is far below that of the logits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32) * scale
    if CAPPED:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)
    tl.store(x + at, z.to(x.dtype.element_ty), mask=at < size)


@dataclass(frozen=True)
class Source:
    """Logits of a flattened batch: R = B * T rows."""

    dense: Tensor | None
    """[R, V], columns contiguous; None: formed from what follows."""
    hidden: Tensor | None = None
    """[R, D]."""
    weight: Tensor | None = None
    """[V, D] in the dtype of the hidden states."""
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, logits: LogitsForm) -> Source:
        """Without copying, unless the columns are not contiguous or the weight has another dtype."""
        if isinstance(logits, HiddenLogits):
            hidden = logits.hidden.detach().flatten(0, 1)
            bias = None if logits.bias is None else logits.bias.detach().to(hidden.dtype)
            return cls(None, hidden, logits.weight.detach().to(hidden.dtype), bias, logits.scale, logits.softcap)
        dense = logits.dense().detach().flatten(0, 1)
        return cls(dense if dense.stride(1) == 1 else dense.contiguous())

    @property
    def rows(self) -> int:
        """R."""
        given = self.dense if self.dense is not None else self.hidden
        assert given is not None
        return given.shape[0]

    @property
    def vocab(self) -> int:
        """V."""
        given = self.dense if self.dense is not None else self.weight
        assert given is not None
        return given.shape[1 if self.dense is not None else 0]

    def tile(self, first: int, last: int) -> Tensor:
        """[last - first, V]: a view, or newly formed in rows with room for whole vectors."""
        if self.dense is not None:
            return self.dense[first:last]
        assert self.hidden is not None and self.weight is not None
        return self._formed(self.hidden[first:last], self.weight, self.bias)

    def columns(self, first: int, last: int, index: Tensor) -> Tensor:
        """[last - first, k]: formed at the columns `index` [k] alone. Only of hidden states."""
        assert self.hidden is not None and self.weight is not None
        return self._formed(self.hidden[first:last], self.weight[index], None if self.bias is None else self.bias[index])

    def _formed(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = empty_rows(hidden.shape[0], weight.shape[0], hidden.dtype, hidden.device)
        if bias is None:
            torch.mm(hidden, weight.T, out=logits)
        else:
            torch.addmm(bias, hidden, weight.T, out=logits)
        if self.scale != 1.0 or self.cap is not None:
            block = 4096
            size = logits.shape[0] * logits.stride(0)
            launch(
                _cap_kernel,
                (ceil_div(size, block),),
                logits,
                size,
                self.scale,
                self.cap or 1.0,
                CAPPED=self.cap is not None,
                BLOCK=block,
            )
        return logits


class StudentRows(NamedTuple):
    """The student's side of a batch: R rows."""

    source: Source
    counted: Tensor
    """[R] bool: rows with cross-entropy."""
    active: Tensor
    """[R] bool: rows with any term; others get a gradient of zero."""
    targets: Tensor
    """[R] int64."""
    length: int
    """T: rows of a sequence."""


class HiddenGradients:
    """The gradients by hidden states, lm_head weight and bias, added up tile by tile in float32 (at least)."""

    def __init__(self, source: Source, logits: HiddenLogits, one_tile: bool):
        """`one_tile`: the only tile's product may be rounded to the weight's dtype at once."""
        self.source, self.like, self.one_tile = source, logits, one_tile
        hidden = logits.hidden
        self.hidden = torch.empty(source.rows, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, gradient: Tensor, first: int) -> None:
        """From the gradient [n, V] by a tile's raw logits."""
        assert self.source.hidden is not None and self.source.weight is not None
        rows = slice(first, first + gradient.shape[0])
        torch.mm(gradient, self.source.weight, out=self.hidden[rows])
        self._add_head(gradient, self.source.hidden[rows])

    def add_padded(self, gradient: Tensor, hidden: Tensor, first: int, last: int) -> None:
        """As `add`, of the rows first..last-1 and, behind them, rows whose gradients and hidden states [n, D] are zero.

        They are there since products of other sizes are several times slower.
        """
        assert self.source.weight is not None
        if gradient.shape[0] == last - first:
            torch.mm(gradient, self.source.weight, out=self.hidden[first:last])
        else:
            self.hidden[first:last] = (gradient @ self.source.weight)[: last - first]
        self._add_head(gradient, hidden)

    def _add_head(self, gradient: Tensor, hidden: Tensor) -> None:
        if self.like.weight.requires_grad:
            self._add_weight(gradient.T, hidden)
        if self.like.bias is not None and self.like.bias.requires_grad:
            total = gradient.sum(0, dtype=torch.float32)
            self.bias = total if self.bias is None else self.bias + total

    def _add_weight(self, left: Tensor, right: Tensor) -> None:
        wanted = self.like.weight.dtype
        if self.one_tile and left.dtype == wanted:
            self.weight = left @ right
        elif left.dtype == torch.float32:
            self.weight = left @ right if self.weight is None else self.weight.addmm_(left, right)
        elif self.weight is None:
            self.weight = torch.mm(left, right, out_dtype=torch.float32)
        else:
            torch.ops.aten.addmm.dtype_out(self.weight, left, right, torch.float32, out=self.weight)

    def finished(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients by hidden states [B, T, D], weight and bias, in their dtypes."""
        weight = None if self.weight is None else self.weight.to(self.like.weight.dtype)
        bias = None if self.bias is None or self.like.bias is None else self.bias.to(self.like.bias.dtype)
        return self.hidden.view(self.like.hidden.shape), weight, bias
