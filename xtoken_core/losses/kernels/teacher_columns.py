"""The teacher within K: which columns are K, from dense logits or from hidden states, and its logits there."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from xtoken_core.losses.kernels.choose import all_columns, largest_columns
from xtoken_core.losses.kernels.columns import column_maxima, gather_columns, within_lse
from xtoken_core.losses.kernels.sources import Source
from xtoken_core.losses.kernels.tiles import Range
from xtoken_core.losses.types import TeacherBatch
from xtoken_core.spec import LossSpec

COLUMN_ROWS = 1024
"""Rows of the teacher's logits formed at a time while its columns are chosen."""


def choose_columns(teacher: TeacherBatch, source: Source, mask: Tensor | None, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """K [sets, k] int32, ascending, and where each column stands in it [sets, V]; one set a sequence, or one in all (`topk_scope: batch`).

    `mask`: [R_t] bool rows that have a say; None: all.
    """
    batch, _, vocab = teacher.logits.shape
    sets = 1 if spec.topk_scope == "batch" else batch
    if spec.vocab_topk >= vocab:
        return all_columns(sets, vocab, teacher.logits.device)
    maxima = []
    for begin in range(0, source.rows, source.rows // sets):
        last = begin + source.rows // sets
        step = COLUMN_ROWS if source.dense is None else last - begin
        bounds = [*range(begin, last, step), last]
        found = [
            column_maxima(source.tile(a, b), None if mask is None else mask[a:b])
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        maxima.append(functools.reduce(torch.maximum, found))
    return largest_columns(torch.stack(maxima) if sets > 1 else maxima[0][None], spec.vocab_topk)


def teacher_within(
    source: Source, rows: Range, active: Tensor, index: Tensor, length: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """A teacher's logits [n, k] within K of the n `rows`, and their log-sum-exp / τ [n]; see `gather_columns`."""
    first, last = rows
    if first == last:
        nothing = torch.empty(0, device=active.device)
        return nothing, nothing
    if source.dense is not None:
        return gather_columns(source.tile(first, last), first, active, index, length, temperature)
    if index.shape[0] == 1:
        within = source.columns(first, last, index[0])
    else:
        pieces, row = [], first
        while row < last:
            end = min(last, (row // length + 1) * length)
            pieces.append(source.columns(row, end, index[row // length]))
            row = end
        within = torch.cat(pieces)
    return within, within_lse(within, first, active, temperature)
