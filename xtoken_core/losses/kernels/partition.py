"""partition_kl from hidden states, at τ = 1 and not reversed: masses of cells, their KL, and the gradient by the logits, each in one pass.

A tile's columns are the student's rows as they come, and the teacher's so that the rows of a chunk's first token are in the same column: no
shape depends on how many chunks are valid, so the host waits for nothing, but in batches of several tiles once for where they may be cut.
The cross-entropy comes from the same logits. Logs are to the base 2 inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.cell_scores import CellScores
from xtoken_core.losses.kernels.autograd import scaled
from xtoken_core.losses.kernels.cell_masses import (
    BLOCK,
    COLUMNS,
    LEAST,
    LOG2_E,
    SPLITS,
    CellSide,
    CellVocabulary,
    log_masses,
    whole_programs,
)
from xtoken_core.losses.kernels.chunks import Rows
from xtoken_core.losses.kernels.compared import Compared, compared_rows
from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.kernels.realised import Columns, Slopes, Teacher, realised_part
from xtoken_core.losses.kernels.rowsets import counted_rows
from xtoken_core.losses.kernels.scored_cells import scored_masses
from xtoken_core.losses.kernels.sources import HiddenGradients
from xtoken_core.losses.kernels.tiles import Cuts, TileRows
from xtoken_core.losses.logits import HiddenLogits, Logits
from xtoken_core.losses.selection import next_token_ids
from xtoken_core.losses.types import StudentBatch, TeacherBatch
from xtoken_core.spec import LossSpec

STEPS = 8
"""Blocks of tokens of a program that writes the gradient."""


@triton.jit
def _kl_kernel(own, other, out, floored, cells, per_split, LEAST: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """out[split, column]: Σ Q_T (log Q_T - log Q_S) over the cells of a split, Q the renormalised masses.

    floored[split, column]: Σ Q_T over those where the student's mass is at the floor and does not move.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first = tl.program_id(1) * per_split
    own_top, own_over = tl.load(own.top + column), tl.load(own.over + column)
    their_top, their_over, their_rest = tl.load(other.top + column), tl.load(other.over + column), tl.load(other.rest + column)
    more = their_rest - tl.load(own.rest + column)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    still = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for c in range(first, first + per_split, BLOCK):
        cell = (c + tl.arange(0, BLOCK))[:, None]
        inside = cell < cells
        s = log_masses(own, tl.load(own.at + cell, mask=inside, other=-1), column, own_top, own_over, inside, LEAST)
        t = log_masses(other, tl.load(other.at + cell, mask=inside, other=-1), column, their_top, their_over, inside, LEAST)
        q = tl.where(inside, tl.exp2(t + their_rest), 0.0)
        total += q * (t - s + more)
        still += tl.where(s > LEAST, 0.0, q)
    at = tl.program_id(1) * own.columns + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(out + at, tl.sum(total, 0))
    tl.store(floored + at, tl.sum(still, 0))


@triton.jit
def _gradient_kernel(
    own, other, columns, slopes, cell, kd, ce, vocab, cells,
    LEAST: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The gradient by the student's logits of kd · partition_kl + ce · cross-entropy, written over them."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    live = column < columns.size
    told = tl.load(columns.partner + column, mask=live, other=-1) >= 0
    owner = tl.load(columns.owner + column, mask=live, other=-1)
    factor = tl.load(kd).to(tl.float32)
    by_kd = tl.where(told, factor, 0.0)
    by_ce = tl.load(ce).to(tl.float32) * tl.load(columns.counted + column, mask=live, other=0).to(tl.float32)
    by_token = factor * tl.load(slopes.chunk + owner - columns.first, mask=owner >= 0, other=0.0) - by_ce
    still = -by_token - by_kd * tl.load(slopes.rest + column)
    moving = still + by_kd * tl.exp2(tl.load(own.rest + column))
    by_cell = by_kd * tl.load(slopes.cell + column)
    active = told | (owner >= 0) | (by_ce != 0.0)
    realised = tl.load(columns.cell + column, mask=live, other=-1)
    following = tl.load(columns.following + column, mask=live, other=-1).to(tl.int32)
    own_top, own_over = tl.load(own.top + column), tl.load(own.over + column)
    their_top, their_over, their_rest = tl.load(other.top + column), tl.load(other.over + column), tl.load(other.rest + column)
    for step in range(STEPS):
        place = ((tl.program_id(1) * STEPS + step) * BLOCK + tl.arange(0, BLOCK))[:, None]
        inside = place < vocab
        c = tl.load(cell + place, mask=inside, other=cells)
        has = c < cells
        at = place.to(tl.int64) * own.columns + column
        z = (tl.load(own.logits + at, mask=inside, other=0.0).to(tl.float32) - own_top) * LOG2_E - own_over
        row = tl.load(own.at + c, mask=has, other=-1)
        stored = tl.load(own.table + (-1 - row).to(tl.int64) * own.columns + column, mask=has & (row < 0), other=LEAST)
        s = tl.maximum(tl.where(row < 0, stored, z), LEAST)
        t = log_masses(other, tl.load(other.at + c, mask=has, other=-1), column, their_top, their_over, has, LEAST)
        of_mass = tl.where(c == realised, by_cell, 0.0) - by_kd * tl.exp2(t + their_rest)
        result = tl.exp2(z) * tl.where(s > LEAST, moving, still) + tl.where(s > LEAST, of_mass * tl.exp2(z - s), 0.0)
        result += tl.where(place == following, by_token, 0.0)
        tl.store(own.logits + at, tl.where(active, result, 0.0).to(own.logits.dtype.element_ty), mask=inside)


def takes(student: StudentBatch, teacher: TeacherBatch, spec: LossSpec) -> bool:
    """Whether these kernels know the form of both sides' logits, and the options."""
    return (
        spec.temperature == 1.0
        and not spec.reverse_kl
        and _plain(student.logits)
        and (_plain(teacher.logits) or isinstance(teacher.logits, CellScores))
    )


def _plain(form: Logits) -> bool:
    return isinstance(form, HiddenLogits) and form.bias is None and form.scale == 1.0 and form.softcap is None


@dataclass(frozen=True)
class Wanted:
    """What `run` is to make: gradients of kd · partition_kl, and with `ce` of ce · cross-entropy too."""

    gradients: bool
    kd: Tensor
    """0-dim."""
    ce: Tensor | None = None
    """0-dim; None: no cross-entropy, and its sums are zero."""


def run(student: StudentBatch, teacher: TeacherBatch, spec: LossSpec, wanted: Wanted) -> tuple[Tensor, list[Tensor | None]]:
    """Of what `takes`: [3] float64 sums (partition_kl, cross-entropy, tokens that are the argmax), and the gradients by the student's tensors."""
    form = student.logits
    assert isinstance(form, HiddenLogits) and teacher.projection is not None
    samples = student.sample_mask if wanted.ce is not None else torch.zeros_like(student.sample_mask)
    counted, following, _ = counted_rows(student.input_ids, student.token_mask, samples)
    own = CellVocabulary(form, teacher.projection, "student", following)
    compared = compared_rows(student, teacher, spec)
    cuts = Cuts(own.source.rows, [(compared.student, compared.teacher)])
    other = _teacher_side(teacher, compared)
    tiles = cuts.tiles()
    gradients = HiddenGradients(own.source, form, len(tiles) == 1) if wanted.gradients else None

    def one(tile: TileRows) -> Tensor:
        part = slice(tile.first, tile.last)
        partner, cell, owner, counts, next_ids = (x[part] for x in (*compared[:3], counted, following))
        columns = Columns(partner, cell, owner, counts, next_ids, tile.first, tile.last - tile.first)
        side = own.side(tile.first, tile.last)
        beside = other(tile, side)
        sums, slopes = _compare(side, compared.student, beside, columns)
        if gradients is not None:
            _write_gradient(side, beside, columns, slopes, wanted)
            gradients.add_padded(side.masses.logits.T, side.hidden, tile.first, tile.last)
        return sums

    sums = torch.stack([one(tile) for tile in tiles]).sum(0)
    return sums, [] if gradients is None else list(gradients.finished())


def _teacher_side(teacher: TeacherBatch, compared: Compared) -> Callable[[TileRows, CellSide], Teacher]:
    """From a tile and the student's side of it to the teacher's."""
    form = teacher.logits
    assert teacher.projection is not None and teacher.input_ids is not None

    def scored(tile: TileRows, student: CellSide) -> Teacher:
        assert isinstance(form, CellScores)
        (begin, end), more = tile.by_term[0], student.masses.columns - (tile.last - tile.first)
        rows = torch.nn.functional.pad(compared.partner[tile.first : tile.last].clamp(min=0), (0, more))
        return Teacher(scored_masses(form, rows, student), form.realised.flatten()[begin:end], begin, compared.teacher)

    if isinstance(form, CellScores):
        return scored
    assert isinstance(form, HiddenLogits)
    vocabulary = CellVocabulary(form, teacher.projection, "teacher", next_token_ids(teacher.input_ids).flatten())

    def live(tile: TileRows, _: CellSide) -> Teacher:
        begin, end = tile.by_term[0]
        columns = whole_programs(max(tile.last - tile.first, end - begin))
        side = vocabulary.side(begin, end, compared.teacher_order(tile.first, tile.last, begin, end, columns))
        return Teacher(side.masses, side.tokens, begin, compared.teacher)

    return live


def _compare(own: CellSide, rows: Rows, teacher: Teacher, columns: Columns) -> tuple[Tensor, Slopes]:
    """A tile's sums, as of `run`, and the derivatives of partition_kl. rows: the student's of all chunks."""
    cells = len(own.masses.at)
    parts, floored = torch.empty(2, SPLITS, own.masses.columns, device=own.tokens.device)
    per_split = ceil_div(ceil_div(cells, SPLITS), BLOCK) * BLOCK
    launch(
        _kl_kernel, (own.masses.columns // COLUMNS, SPLITS), own.masses, teacher.masses, parts, floored, cells, per_split,
        LEAST=LEAST, BLOCK=BLOCK, COLUMNS=COLUMNS,
    )  # fmt: skip
    return realised_part(own, rows, teacher, columns, parts, floored)


def _write_gradient(own: CellSide, teacher: Teacher, columns: Columns, slopes: Slopes, wanted: Wanted) -> None:
    """In place of a tile's logits."""
    vocab, size = own.masses.logits.shape
    ce = torch.zeros_like(wanted.kd) if wanted.ce is None else wanted.ce
    launch(
        _gradient_kernel, (size // COLUMNS, ceil_div(vocab, BLOCK * STEPS)), own.masses, teacher.masses, columns, slopes, own.lists.cell, wanted.kd,
        ce, vocab, len(own.masses.at), LEAST=LEAST, BLOCK=BLOCK, COLUMNS=COLUMNS, STEPS=STEPS, num_warps=8,
    )  # fmt: skip


def sum_and_gradients(
    student: StudentBatch, teacher: TeacherBatch, spec: LossSpec, wanted: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """As `partition_tiles.sum_and_gradients`, of what `takes`."""
    sums, gradients = run(student, teacher, spec, Wanted(wanted, torch.ones((), device=student.logits.device)))
    return sums[0].float(), gradients


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: StudentBatch, teacher: TeacherBatch, spec: LossSpec, wanted: Wanted, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        found, ctx.gradients = run(student, teacher, spec, wanted)
        total = wanted.kd * found[0]
        ctx.mark_non_differentiable(found)
        ctx.set_materialize_grads(False)
        return found, (total if wanted.ce is None else total + wanted.ce * found[1]).float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("partition_kl: a second backward is not supported")
        return None, None, None, None, *(scaled(x, upstream[1]) for x in gradients)


def weighted_sums(
    student: StudentBatch, teacher: TeacherBatch, spec: LossSpec, kd: Tensor, ce: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sums of `run`, and kd · partition_kl + ce · cross-entropy, 0-dim float32, which alone is differentiable, once."""
    tensors = student.logits.tensors
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _Sums.apply(student, teacher, spec, Wanted(gradients, kd, ce), *tensors)
