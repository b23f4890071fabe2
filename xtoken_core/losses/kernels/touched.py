"""Which of the student's columns matter to K, and W seen from both sides of that: everything on the device, nothing bounded in advance.

A student token is *touched* when W (or, for a teacher with the student's own vocabulary, K itself) maps it into the K teacher columns of
its sequence. Lists have room for the whole vocabulary (or for what W can hold at most) and their length stays on the device, so nothing can overflow
and nobody waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.launch import ceil_div, launch
from xtoken_core.losses.tables import projection_entries

if TYPE_CHECKING:
    from xtoken_core.projection import Projection


@dataclass(frozen=True)
class ByTeacher:
    """W's nonzeros in the order of the teacher's columns (compressed sparse columns)."""

    start: Tensor
    """[V_t + 1] int32: column j has entries start[j] : start[j + 1]."""
    student: Tensor
    """[n] int32."""
    slot: Tensor
    """[n] int64: where its weight is in `projection.weights.flatten()`."""
    most: Tensor
    """[V_t] int64 on the CPU: most[k - 1] is the most entries that any k columns have between them."""


def by_teacher(projection: Projection, student_vocab: int, teacher_vocab: int) -> ByTeacher:
    """Made once for a projection's entries and these sizes."""
    return projection.table(_by_teacher, student_vocab, teacher_vocab)


def _by_teacher(projection: Projection, student_vocab: int, teacher_vocab: int) -> ByTeacher:
    entries = projection_entries(projection, student_vocab)
    column, order = entries.teacher.sort(stable=True)
    start = torch.searchsorted(column, torch.arange(teacher_vocab + 1, device=column.device), out_int32=True)
    most = start.diff().sort(descending=True).values.cumsum(0).cpu()
    return ByTeacher(start, entries.student[order].int(), entries.slot[order], most)


def by_column(projection: Projection, student_vocab: int, teacher_vocab: int) -> Tensor:
    """[n] float32: W's weights in the order of `by_teacher`; kept for weights that do not learn."""
    if projection.weights.requires_grad:
        return _by_column(projection, student_vocab, teacher_vocab)
    return projection.weighted_table(_by_column, student_vocab, teacher_vocab)


def _by_column(projection: Projection, student_vocab: int, teacher_vocab: int) -> Tensor:
    slot = by_teacher(projection, student_vocab, teacher_vocab).slot
    return projection.weights.detach().flatten()[slot].float()


@dataclass(frozen=True)
class Touched:
    """The student's touched columns of each sequence, ascending, over all teachers."""

    token: Tensor
    """[sets, room for V_s] int32; only the first `count` are set."""
    count: Tensor
    """[sets] int32."""
    rank: Tensor
    """[sets, room] int32: inclusive count of touched tokens up to each; a touched token stands at rank - 1."""
    flag: Tensor
    """[sets, room] int32: 1 where touched."""
    limit: int
    """No sequence has more."""


@dataclass(frozen=True)
class Placed:
    """Of one teacher, by touched token: its entries within K."""

    number: Tensor
    """[sets, room] int32: entries."""
    position: Tensor
    """[sets, slots, room] int32: column of K; a token's entries come first."""
    weight: Tensor
    """[sets, slots, room] float32."""
    slot: Tensor
    """[sets, slots, room] int32: which of the token's `slots` entries in W it is."""


@triton.jit
def _mark_kernel(indices, place, flag, vocab, room, teacher_vocab, SLOTS: tl.constexpr, FRESH: tl.constexpr, BLOCK: tl.constexpr):
    """Flags the tokens of a block that W maps into K, beside those flagged already."""
    set_ = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    hit = tl.zeros([BLOCK], tl.int32)
    if not FRESH:
        hit = tl.load(flag + set_ * room + token, mask=inside, other=0)
    for s in range(SLOTS):
        column = tl.load(indices + token.to(tl.int64) * SLOTS + s, mask=inside, other=-1)
        position = tl.load(place + set_ * teacher_vocab + column, mask=column >= 0, other=-1)
        hit = tl.where(position >= 0, 1, hit)
    tl.store(flag + set_ * room + token, hit, mask=token < room)


@triton.jit
def _place_kernel(
    indices,
    weights,
    place,
    rank,
    flag,
    tokens,
    number,
    position,
    weight,
    slot,
    vocab,
    room,
    teacher_vocab,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a block's touched tokens, and their entries within K, to their places in the list."""
    set_ = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    touched = inside & (tl.load(flag + set_ * room + token, mask=inside, other=0) != 0)
    at = tl.load(rank + set_ * room + token, mask=touched, other=1) - 1
    tl.store(tokens + set_ * room + at, token, mask=touched)
    out = set_.to(tl.int64) * SLOTS * room + at
    found = tl.zeros([BLOCK], tl.int32)
    for s in range(SLOTS):
        entry = token.to(tl.int64) * SLOTS + s
        column = tl.load(indices + entry, mask=touched, other=-1)
        p = tl.load(place + set_ * teacher_vocab + column, mask=column >= 0, other=-1)
        here = p >= 0
        tl.store(position + out + found * room, p, mask=here)
        tl.store(weight + out + found * room, tl.load(weights + entry, mask=here, other=0.0).to(tl.float32), mask=here)
        tl.store(slot + out + found * room, tl.full([BLOCK], s, tl.int32), mask=here)
        found += here.to(tl.int32)
    tl.store(number + set_ * room + at, found, mask=touched)


_TOKENS = 1024


def mark(flag: Tensor, indices: Tensor, place: Tensor, fresh: bool) -> None:
    """Sets flag [sets, room] where W's `indices` [V_s, slots] reach into K; `fresh`: and clears it elsewhere."""
    sets, width = flag.shape
    launch(
        _mark_kernel,
        (ceil_div(width, _TOKENS), sets),
        indices,
        place,
        flag,
        indices.shape[0],
        width,
        place.shape[1],
        SLOTS=indices.shape[1],
        FRESH=fresh,
        BLOCK=_TOKENS,
    )


def touched_tokens(flag: Tensor, limit: int) -> Touched:
    """Room for the list of what is flagged in [sets, room] int32; `placed_entries` writes it."""
    rank = flag.cumsum(1, dtype=torch.int32)
    token = torch.empty_like(flag)
    return Touched(token, rank[:, -1].contiguous(), rank, flag, limit)


def placed_entries(touched: Touched, indices: Tensor, weights: Tensor, place: Tensor) -> Placed:
    """W's entries within K by touched token; `indices`, `weights`: [V_s, slots], contiguous."""
    (sets, width), (vocab, slots) = touched.token.shape, indices.shape
    position = torch.empty(sets, slots, width, dtype=torch.int32, device=indices.device)
    weight = torch.empty(sets, slots, width, device=indices.device)
    slot = torch.empty_like(position)
    number = torch.empty_like(touched.token)
    launch(
        _place_kernel,
        (ceil_div(width, _TOKENS), sets),
        indices,
        weights,
        place,
        touched.rank,
        touched.flag,
        touched.token,
        number,
        position,
        weight,
        slot,
        vocab,
        width,
        place.shape[1],
        SLOTS=slots,
        BLOCK=_TOKENS,
    )
    return Placed(number, position, weight, slot)
