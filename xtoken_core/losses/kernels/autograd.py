"""The terms of a batch through the kernels, differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.batch import Batch
from xtoken_core.losses.kernels.gradient import Factors
from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.kernels.rows import Tile, empty_rows
from xtoken_core.losses.kernels.sources import HiddenGradients
from xtoken_core.losses.kernels.tile_gradient import TileGradient
from xtoken_core.losses.kernels.totals import weighted_total
from xtoken_core.losses.logits import HiddenLogits
from xtoken_core.losses.types import Coefficients, StudentBatch, TeacherBatch, TermSums
from xtoken_core.spec import LossSpec


@triton.jit
def _scale_kernel(x, factor, size, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32) * by
        tl.store(x + at, value.to(x.dtype.element_ty), mask=at < size)


def scaled(x: Tensor | None, factor: Tensor) -> Tensor | None:
    """x *= factor (0-dim, on the device); costs nothing where the factor is 1."""
    if x is not None and x.numel():
        launch(_scale_kernel, (ceil_div(x.numel(), 8192),), x, factor, x.numel(), BLOCK=8192, num_warps=8)
    return x


class _Terms(torch.autograd.Function):
    """`batch_totals`, then the CE sum and the KD sums, or with coefficients their total: by what the student's logits are made of and the
    learnable weights of W.
    """

    @staticmethod
    def forward(
        ctx: Any, batch: Batch, coefficients: Coefficients | None, wanted: bool, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`wanted`: there will be a backward."""
        ctx.batch, ctx.coefficients, ctx.ready, ctx.kept = batch, coefficients, None, []
        from_hidden = isinstance(batch.student, HiddenLogits)
        if from_hidden and wanted and coefficients is not None:
            ctx.ready = _hidden_gradients(batch, Factors(coefficients.ce, coefficients.kd))
        elif not from_hidden and wanted and len(batch.tiles) == 1:
            batch.run(lambda tile, parts: ctx.kept.append((tile, parts)))
        else:
            batch.run()
        ctx.set_materialize_grads(False)
        if ctx.ready is None:
            ctx.save_for_backward(*inputs)
        found = batch.totals()
        ctx.mark_non_differentiable(found)
        ce, kd = found[0], found[2::3]
        if coefficients is None:
            return found, ce, kd
        return found, weighted_total(found, coefficients.ce, coefficients.kd)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        """From what forward kept, or by another run."""
        batch: Batch = ctx.batch
        if ctx.ready is not None:
            gradients, ctx.ready = ctx.ready, None  # a second backward would find them scaled: it forms them anew
            assert upstream[1] is not None
            return None, None, None, *(scaled(x, upstream[1]) for x in gradients)
        _ = ctx.saved_tensors  # complains if one was changed since
        if ctx.coefficients is not None:
            factors = Factors(ctx.coefficients.ce, ctx.coefficients.kd, upstream[1])
        else:
            device = batch.rows.counted.device
            ce = torch.zeros((), device=device) if upstream[1] is None else upstream[1]
            kd = torch.zeros(len(batch.terms), device=device) if upstream[2] is None else upstream[2].contiguous()
            factors = Factors(ce, kd)
        if isinstance(batch.student, HiddenLogits):
            if factors.both is not None:
                factors = Factors(factors.ce * factors.both, factors.kd * factors.both)
            return None, None, None, *_hidden_gradients(batch, factors)
        return None, None, None, *_dense_gradients(batch, ctx.kept, factors)


def _dense_gradients(batch: Batch, kept: list[tuple[Tile, TileGradient]], factors: Factors) -> list[Tensor | None]:
    """By the student's logits and the weights of W; from the tile that forward kept, or by another run."""
    shape = batch.student.shape
    out = torch.empty(shape, dtype=batch.student.dtype, device=batch.student.device).flatten(0, 1)
    weights: dict[int, Tensor] = {}

    def use(tile: Tile, parts: TileGradient) -> None:
        kd = factors.kd if factors.both is None else factors.kd * factors.both
        batch.add_weight_gradients(tile, parts, kd, weights)
        batch.write_gradient(tile, parts, out[tile.first : tile.last], factors)

    for tile, parts in kept:
        use(tile, parts)
    if not kept:
        batch.run(use)
    return [out.view(shape), *_by_weights(batch, weights)]


def _hidden_gradients(batch: Batch, factors: Factors) -> list[Tensor | None]:
    """By hidden states, lm_head weight and bias, and the weights of W, in one run over the tiles."""
    assert isinstance(batch.student, HiddenLogits)
    gradients = HiddenGradients(batch.rows.source, batch.student, len(batch.tiles) == 1)
    weights: dict[int, Tensor] = {}

    def use(tile: Tile, parts: TileGradient) -> None:
        batch.add_weight_gradients(tile, parts, factors.kd, weights)
        logits = tile.logits
        beside = (
            empty_rows(logits.shape[0], logits.shape[1], logits.dtype, logits.device) if parts.common else logits
        )  # where no other row is read, in place
        batch.write_gradient(tile, parts, beside, factors)
        gradients.add(beside, tile.first)

    with torch.autocast(batch.student.device.type, enabled=False):
        batch.run(use)
    return [*gradients.finished(), *_by_weights(batch, weights)]


def _by_weights(batch: Batch, weights: dict[int, Tensor]) -> list[Tensor | None]:
    padded: list[Tensor | None] = []
    for i, like in batch.learnable:
        full = torch.zeros_like(like)
        full[: weights[i].shape[0]] = weights[i]
        padded.append(full)
    return padded


def term_sums(
    student: StudentBatch, teachers: Sequence[TeacherBatch], spec: LossSpec, coefficients: Coefficients | None = None
) -> TermSums:
    """As `plain.term_sums`, by the kernels. Student's logits in float32, bfloat16 or float16."""
    with torch.autocast(student.logits.device.type, enabled=False):  # products are formed in the dtype of the hidden states
        batch = Batch.of(student, teachers, spec)
        inputs = [*student.logits.tensors, *(weights for _, weights in batch.learnable)]
        wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        found, *sums = _Terms.apply(batch, coefficients, wanted, *inputs)
        ce, kd = sums if coefficients is None else (found[0], found[2::3])
        return TermSums(ce, kd, found[1], found[3::3], found[4::3], None if coefficients is None else sums[0])
