"""partition_kl from hidden states, at τ = 1 and not reversed: masses of cells, their KL, and the gradient by the logits, each in one pass.

A tile's columns are rows of the batch as they come, on either side: no shape depends on how many chunks are valid, so the host waits for
nothing, but in batches of several tiles once for where they may be cut. The student's column of a chunk's first token finds its teacher's by
number. The cross-entropy comes from the same logits.
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
from xtoken_core.losses.kernels.cell_masses import BLOCK, COLUMNS, LOG_FLOOR, SPLITS, CellSide, CellVocabulary, log_masses
from xtoken_core.losses.kernels.chunks import Rows
from xtoken_core.losses.kernels.compared import compared_rows
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


@triton.jit
def _kl_kernel(
    own, other, columns, out, floored, cells, per_split, LOG_FLOOR: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[split, column]: Σ Q_T (log Q_T - log Q_S) over the cells of a split, Q the renormalised masses.

    floored[split, column]: Σ Q_T over those where the student's mass is at the floor and does not move.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * per_split
    partner = tl.load(columns.partner + column, mask=column < columns.size, other=-1)
    told = partner >= 0
    theirs = tl.where(told, partner - columns.shift, 0)
    own_rest, their_rest = tl.load(own.rest + column)[None, :], tl.load(other.rest + theirs)[None, :]
    total = tl.zeros([COLUMNS], tl.float32)
    still = tl.zeros([COLUMNS], tl.float32)
    for c in range(first, first + per_split, BLOCK):
        cell = (c + tl.arange(0, BLOCK))[:, None]
        use = (cell < cells) & told[None, :]
        s = log_masses(own, tl.load(own.at + cell, mask=cell < cells, other=0), column[None, :], use, LOG_FLOOR)
        t = log_masses(other, tl.load(other.at + cell, mask=cell < cells, other=0), theirs[None, :], use, LOG_FLOOR) + their_rest
        q = tl.where(use, tl.exp(t), 0.0)
        total += tl.sum(tl.where(use, q * (t - (s + own_rest)), 0.0), 0)
        still += tl.sum(tl.where(s <= LOG_FLOOR, q, 0.0), 0)
    tl.store(out + tl.program_id(1) * own.columns + column, total)
    tl.store(floored + tl.program_id(1) * own.columns + column, still)


@triton.jit
def _gradient_kernel(
    own, other, columns, slopes, cell, kd, ce, vocab, cells, LOG_FLOOR: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """The gradient by the student's logits of kd · partition_kl + ce · cross-entropy, written over them."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < columns.size
    partner = tl.load(columns.partner + column, mask=live, other=-1)
    owner = tl.load(columns.owner + column, mask=live, other=-1)
    told = partner >= 0
    theirs = tl.where(told, partner - columns.shift, 0)
    by_kd = tl.load(kd).to(tl.float32)
    by_ce = tl.load(ce).to(tl.float32) * tl.load(columns.counted + column, mask=live, other=0).to(tl.float32)
    by_token = by_kd * tl.load(slopes.chunk + owner - columns.first, mask=owner >= 0, other=0.0) - by_ce
    everywhere = by_token + tl.where(told, by_kd * tl.load(slopes.rest + column), 0.0)

    inside = place < vocab
    c = tl.load(cell + place, mask=inside, other=cells)
    has = c < cells
    at = place.to(tl.int64)[:, None] * own.columns + column[None, :]
    z = tl.load(own.logits + at, mask=inside[:, None], other=float("-inf")).to(tl.float32) - tl.load(own.lse + column)[None, :]
    use = has[:, None] & told[None, :]
    row = tl.load(own.at + c, mask=has, other=0)[:, None]
    stored = tl.load(own.table + (-1 - row).to(tl.int64) * own.columns + column[None, :], mask=use & (row < 0), other=0.0)
    s = tl.maximum(tl.where(row < 0, stored, z), LOG_FLOOR)
    t = log_masses(other, tl.load(other.at + c, mask=has, other=0)[:, None], theirs[None, :], use, LOG_FLOOR)
    realised = c[:, None] == tl.load(columns.cell + column, mask=live, other=-1)[None, :]
    of_cell = tl.where(realised, tl.load(slopes.cell + column)[None, :], 0.0)
    q = tl.exp(t + tl.load(other.rest + theirs)[None, :])
    within = tl.exp(tl.load(own.rest + column))[None, :] + (of_cell - q) * tl.exp(-s)
    within = by_kd * tl.where(use & (s > LOG_FLOOR), within, 0.0)
    here = place[:, None] == tl.load(columns.following + column, mask=live, other=-1)[None, :]
    result = tl.exp(z) * (within - everywhere[None, :]) + tl.where(here, by_token[None, :], 0.0)
    active = (told | (owner >= 0) | (by_ce != 0.0))[None, :]
    tl.store(own.logits + at, tl.where(active, result, 0.0).to(own.logits.dtype.element_ty), mask=inside[:, None])


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
    other = _teacher_side(teacher, compared.teacher)
    tiles = cuts.tiles()
    gradients = HiddenGradients(own.source, form, len(tiles) == 1) if wanted.gradients else None

    def one(tile: TileRows) -> Tensor:
        part = slice(tile.first, tile.last)
        partner, cell, owner, counts, next_ids = (x[part] for x in (*compared[:3], counted, following))
        columns = Columns(partner, cell, owner, counts, next_ids, tile.first, tile.last - tile.first, tile.by_term[0][0])
        side = own.side(tile.first, tile.last)
        beside, columns = other(tile, columns, side)
        sums, slopes = _compare(side, compared.student, beside, columns)
        if gradients is not None:
            _write_gradient(side, beside, columns, slopes, wanted)
            gradients.add_padded(side.masses.logits.T, side.hidden, tile.first, tile.last)
        return sums

    sums = torch.stack([one(tile) for tile in tiles]).sum(0)
    return sums, [] if gradients is None else list(gradients.finished())


def _teacher_side(teacher: TeacherBatch, rows: Rows) -> Callable[[TileRows, Columns, CellSide], tuple[Teacher, Columns]]:
    """From a tile, its columns and the student's side to the teacher's side, and the columns with their partners there. `rows`: of all chunks."""
    form = teacher.logits
    assert teacher.projection is not None and teacher.input_ids is not None

    def scored(tile: TileRows, columns: Columns, student: CellSide) -> tuple[Teacher, Columns]:
        assert isinstance(form, CellScores)
        (first, last), more = tile.by_term[0], student.masses.columns - columns.size
        place = torch.arange(columns.size, dtype=torch.int32, device=columns.partner.device)
        partner = torch.where(columns.partner < 0, -1, place)
        masses = scored_masses(form, torch.nn.functional.pad(columns.partner.clamp(min=0), (0, more)), student)
        return Teacher(masses, form.realised.flatten()[first:last], first, rows), columns._replace(partner=partner, shift=0)

    if isinstance(form, CellScores):
        return scored
    assert isinstance(form, HiddenLogits)
    vocabulary = CellVocabulary(form, teacher.projection, "teacher", next_token_ids(teacher.input_ids).flatten())

    def live(tile: TileRows, columns: Columns, _: CellSide) -> tuple[Teacher, Columns]:
        first, last = tile.by_term[0]
        side = vocabulary.side(first, last)
        return Teacher(side.masses, side.tokens, first, rows), columns

    return live


def _compare(own: CellSide, rows: Rows, teacher: Teacher, columns: Columns) -> tuple[Tensor, Slopes]:
    """A tile's sums, as of `run`, and the derivatives of partition_kl. rows: the student's of all chunks."""
    cells = len(own.masses.at)
    parts, floored = torch.empty(2, SPLITS, own.masses.columns, device=own.tokens.device)
    per_split = ceil_div(ceil_div(cells, SPLITS), BLOCK) * BLOCK
    launch(
        _kl_kernel, (own.masses.columns // COLUMNS, SPLITS), own.masses, teacher.masses, columns, parts, floored, cells, per_split,
        LOG_FLOOR=LOG_FLOOR, BLOCK=BLOCK, COLUMNS=COLUMNS,
    )  # fmt: skip
    return realised_part(own, rows, teacher, columns, parts, floored)


def _write_gradient(own: CellSide, teacher: Teacher, columns: Columns, slopes: Slopes, wanted: Wanted) -> None:
    """In place of a tile's logits."""
    vocab, size = own.masses.logits.shape
    ce = torch.zeros_like(wanted.kd) if wanted.ce is None else wanted.ce
    launch(
        _gradient_kernel, (size // COLUMNS, ceil_div(vocab, BLOCK)), own.masses, teacher.masses, columns, slopes, own.lists.cell, wanted.kd,
        ce, vocab, len(own.masses.at), LOG_FLOOR=LOG_FLOOR, BLOCK=BLOCK, COLUMNS=COLUMNS,
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
