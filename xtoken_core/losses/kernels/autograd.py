"""The terms of a batch through the kernels, tile by tile, and their gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.gradient import TileGradient, write_gradient
from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.kernels.projected import SparseGradient, weight_gradient
from xtoken_core.losses.kernels.rows import RowStats, empty_rows, room, row_stats
from xtoken_core.losses.kernels.rowsets import counted_rows
from xtoken_core.losses.kernels.sources import HiddenGradients, Source
from xtoken_core.losses.kernels.terms import ChunkTerm, CommonTerm, ProjectedTerm, Term, Tile, WithinTerm, make_term
from xtoken_core.losses.kernels.tiles import Cuts
from xtoken_core.losses.kernels.totals import batch_totals, weighted_total
from xtoken_core.losses.kernels.touched import Placed, Touched, mark, placed_entries, touched_tokens
from xtoken_core.losses.kernels.whole import WholeGradient
from xtoken_core.losses.logits import HiddenLogits
from xtoken_core.losses.types import Coefficients, StudentBatch, TeacherBatch, TermSums
from xtoken_core.spec import LossSpec


class Batch:
    """A batch made ready: rows, terms, tables and tiles. `run` does the work, as often as asked."""

    def __init__(self, student: StudentBatch, teachers: Sequence[TeacherBatch], spec: LossSpec):
        self.student, self.spec = student.logits, spec
        self.source = Source.of(student.logits)
        sample_mask = student.sample_mask
        self.counted, self.targets, scope = counted_rows(student.input_ids, student.token_mask, sample_mask)
        self.length = student.logits.shape[1]
        self.terms: list[Term] = [
            make_term(t, self.length, self.source.vocab, self.counted, scope, sample_mask, spec) for t in teachers
        ]
        self.active = self.counted
        for term in self.terms:
            if isinstance(term, ChunkTerm):
                self.active = self.active | term.active
        self.chunked = [term for term in self.terms if isinstance(term, ChunkTerm)]
        formed = [term.source for term in self.chunked if isinstance(term, CommonTerm)]
        at_once = all(source.dense is not None for source in [self.source, *formed])
        cuts = None if at_once else Cuts(self.source.rows, [(term.student, term.teacher) for term in self.chunked])
        self.touched, self.placed = self._tables()
        self.stats = RowStats.empty(self.source.rows, spec.temperature, self.counted.device)
        self.saved: tuple[Tile, TileGradient] | None = None
        self.found = torch.empty(0)
        whole = [((0, self.source.rows), [term.teacher_range for term in self.chunked])]
        self.tiles = whole if cuts is None else cuts.tiles()

    def _tables(self) -> tuple[Touched | None, dict[int, Placed]]:
        sparse = {i: t for i, t in enumerate(self.terms) if isinstance(t, ProjectedTerm | WithinTerm)}
        if not sparse:
            return None, {}
        for term in sparse.values():
            term.prepare()
        sets = next(iter(sparse.values())).place.shape[0]
        flag = torch.empty(sets, room(self.source.vocab), dtype=torch.int32, device=self.counted.device)
        for number, term in enumerate(sparse.values()):
            mark(flag, term.indices, term.place, number == 0)
        limit = min(flag.shape[1], sum(term.reach for term in sparse.values()))
        touched = touched_tokens(flag, limit)
        return touched, {i: placed_entries(touched, t.indices, t.weights, t.place) for i, t in sparse.items()}

    def run(self, use: Callable[[Tile, TileGradient], None] | None = None) -> None:
        """All terms' sums; `use` is called with every tile and what its gradient needs."""
        for (first, last), ranges in self.tiles:
            for term, teacher_range in zip(self.chunked, ranges, strict=True):
                term.teacher_range = teacher_range
            self._run_tile(first, last, use)

    def _run_tile(self, first: int, last: int, use: Callable[[Tile, TileGradient], None] | None) -> None:
        logits = self.source.tile(first, last)
        row_stats(logits, self.active, self.targets, self.stats, first, self.spec.temperature)
        tile = Tile(first, last, logits, self.stats)
        parts = TileGradient([], [], [])
        for i, term in enumerate(self.terms):
            part = term.tile(tile, self.touched)
            if isinstance(part, SparseGradient):
                parts.sparse.append((i, part, self.placed[i], isinstance(term, ProjectedTerm)))
            elif isinstance(part, WholeGradient):
                parts.whole.append((i, part))
            else:
                parts.common.append((i, part))
        if use is not None:
            use(tile, parts)

    def gradient(self, tile: Tile, parts: TileGradient, out: Tensor, ce: Tensor, kd: Tensor, factor: Tensor | None) -> None:
        """Writes a tile's gradient by its raw logits to `out`; see `write_gradient`."""
        write_gradient(
            tile.logits, out, tile.first, self.active, self.counted, self.targets, self.stats, ce, kd, factor, parts, self.touched,
            self.length, self.spec.temperature, self.spec.reverse_kl, self.source.scale, self.source.cap,
        )  # fmt: skip

    def weight_gradients(self, tile: Tile, parts: TileGradient, kd: Tensor, into: dict[int, Tensor]) -> None:
        """Adds a tile's derivative by the weights of every learnable W to `into`, by term."""
        assert self.touched is not None or not parts.sparse
        for i, sparse, placed, _ in parts.sparse:
            term = self.terms[i]
            if isinstance(term, ProjectedTerm) and term.learnable.requires_grad:
                assert self.touched is not None
                found = weight_gradient(
                    tile.logits, tile.first, tile.lse_tau, sparse, self.touched, placed, self.length, self.spec.temperature
                )
                found *= kd[i] * self.spec.temperature**2
                into[i] = into[i] + found if i in into else found

    def totals(self) -> Tensor:
        """See `batch_totals`."""
        return batch_totals(self.counted, self.targets, self.stats, [term.sums() for term in self.terms], self.spec.temperature)


@triton.jit
def _scale_kernel(x, factor, size, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32) * by
        tl.store(x + at, value.to(x.dtype.element_ty), mask=at < size)


def scale_(x: Tensor | None, factor: Tensor) -> Tensor | None:
    """x *= factor (0-dim, on the device); costs nothing where the factor is 1."""
    if x is not None and x.numel():
        launch(_scale_kernel, (ceil_div(x.numel(), 8192),), x, factor, x.numel(), BLOCK=8192, num_warps=8)
    return x


class _Terms(torch.autograd.Function):
    """The CE sum, the KD sums and, with coefficients, their total, by logits (or hidden states, weight, bias) and learnable weights of W."""

    @staticmethod
    def forward(
        ctx: Any, batch: Batch, coefficients: Coefficients | None, wanted: bool, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.batch, ctx.coefficients, ctx.ready = batch, coefficients, None
        if isinstance(batch.student, HiddenLogits):
            if wanted and coefficients is not None:
                ctx.ready = _hidden_gradients(batch, coefficients.ce, coefficients.kd)
            else:
                batch.run()
        elif wanted and len(batch.tiles) == 1:

            def keep(tile: Tile, parts: TileGradient) -> None:
                batch.saved = tile, parts

            batch.run(keep)
        else:
            batch.run()
        ctx.set_materialize_grads(False)
        if ctx.ready is None:
            ctx.save_for_backward(*inputs)
        batch.found = batch.totals()
        ce, kd = batch.found[0], batch.found[2::3]
        if coefficients is None:
            return ce, kd
        return (weighted_total(batch.found, coefficients.ce, coefficients.kd),)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        batch: Batch = ctx.batch
        if ctx.ready is not None:
            gradients, ctx.ready = ctx.ready, None  # a second backward would find them scaled: it forms them anew
            return None, None, None, *(scale_(x, upstream[0]) for x in gradients)
        _ = ctx.saved_tensors  # complains if one was changed since
        if ctx.coefficients is None:
            found = batch.found[0], batch.found[2::3]
            ce, kd = (torch.zeros_like(y) if x is None else x.contiguous() for x, y in zip(upstream, found, strict=True))
            factor = None
        else:
            ce, kd, factor = ctx.coefficients.ce, ctx.coefficients.kd, upstream[0]
        if isinstance(batch.student, HiddenLogits):
            if factor is not None:
                ce, kd = ce * factor, kd * factor
            return None, None, None, *_hidden_gradients(batch, ce, kd)
        return None, None, None, *_dense_gradients(batch, ce, kd, factor)


def _dense_gradients(batch: Batch, ce: Tensor, kd: Tensor, factor: Tensor | None) -> list[Tensor | None]:
    """By the student's logits and the weights of W; from what forward kept, or by another run."""
    shape = batch.student.shape
    out = torch.empty(shape, dtype=batch.student.dtype, device=batch.student.device).flatten(0, 1)
    weights: dict[int, Tensor] = {}

    def use(tile: Tile, parts: TileGradient) -> None:
        batch.weight_gradients(tile, parts, kd if factor is None else kd * factor, weights)
        batch.gradient(tile, parts, out[tile.first : tile.last], ce, kd, factor)

    if batch.saved is not None:
        use(*batch.saved)
    else:
        batch.run(use)
    return [out.view(shape), *_by_weights(batch, weights)]


def _beside(logits: Tensor) -> Tensor:
    return empty_rows(logits.shape[0], logits.shape[1], logits.dtype, logits.device)


def _hidden_gradients(batch: Batch, ce: Tensor, kd: Tensor) -> list[Tensor | None]:
    """By hidden states, lm_head weight and bias, and the weights of W, in one run over the tiles."""
    assert isinstance(batch.student, HiddenLogits)
    gradients = HiddenGradients(batch.source, batch.student, len(batch.tiles) == 1)
    weights: dict[int, Tensor] = {}

    def use(tile: Tile, parts: TileGradient) -> None:
        batch.weight_gradients(tile, parts, kd, weights)
        out = _beside(tile.logits) if parts.common else tile.logits  # in place where no other row is read
        batch.gradient(tile, parts, out, ce, kd, None)
        gradients.add(out, tile.first)

    with torch.autocast(batch.student.device.type, enabled=False):
        batch.run(use)
    return [*gradients.finished(), *_by_weights(batch, weights)]


def _learnable(batch: Batch) -> list[tuple[int, Tensor]]:
    return [(i, t.learnable) for i, t in enumerate(batch.terms) if isinstance(t, ProjectedTerm) and t.learnable.requires_grad]


def _by_weights(batch: Batch, weights: dict[int, Tensor]) -> list[Tensor | None]:
    padded: list[Tensor | None] = []
    for i, like in _learnable(batch):
        full = torch.zeros_like(like)
        full[: weights[i].shape[0]] = weights[i]
        padded.append(full)
    return padded


def term_sums(
    student: StudentBatch, teachers: Sequence[TeacherBatch], spec: LossSpec, coefficients: Coefficients | None = None
) -> TermSums:
    """As `plain.term_sums`, by the kernels. Student's logits in float32, bfloat16 or float16."""
    with torch.autocast(student.logits.device.type, enabled=False):  # products are formed in the dtype of the hidden states
        batch = Batch(student, teachers, spec)
        inputs = [*student.logits.tensors, *(weights for _, weights in _learnable(batch))]
        wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        sums = _Terms.apply(batch, coefficients, wanted, *inputs)
        found = batch.found
        ce, kd = sums if coefficients is None else (found[0], found[2::3])
        return TermSums(ce, kd, found[1], found[3::3], found[4::3], None if coefficients is None else sums[0])
