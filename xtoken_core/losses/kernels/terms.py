"""One teacher's KD as the kernels compute it: what is prepared once for a batch, and what is done with each tile of rows.

Every term has `active` (student rows that carry gradient), `tile(...)`, which computes a tile's KD and returns what the gradient pass
needs, and `sums()`: what adds up to the KD.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken_core.losses.kernels.choose import all_columns, largest_columns, ordered_columns
from xtoken_core.losses.kernels.columns import column_maxima, gather_columns, within_lse
from xtoken_core.losses.kernels.common import SPLIT, CommonGradient, common_kl, vocabulary_split
from xtoken_core.losses.kernels.projected import SparseGradient, chunk_kl, project
from xtoken_core.losses.kernels.ranks import sorted_distance
from xtoken_core.losses.kernels.rows import RowStats, row_stats
from xtoken_core.losses.kernels.rowsets import chunk_rows, counted_rows
from xtoken_core.losses.kernels.sources import Source
from xtoken_core.losses.kernels.touched import Touched, by_column, by_teacher
from xtoken_core.losses.kernels.whole import WholeGradient, whole_kl
from xtoken_core.losses.kernels.within import within_kl
from xtoken_core.losses.logits import AveragedLogits, TopKLogits, as_form
from xtoken_core.losses.selection import top_columns
from xtoken_core.losses.types import TeacherBatch
from xtoken_core.spec import LossSpec

COLUMN_ROWS = 1024
"""Rows of the teacher's logits formed at a time while its columns are chosen."""


@dataclass(frozen=True)
class Tile:
    """Student rows first .. last, and what is known of them."""

    first: int
    last: int
    logits: Tensor
    """[n, V_s]."""
    stats: RowStats
    """Of all rows."""

    @property
    def lse_tau(self) -> Tensor:
        """[n] float32."""
        return self.stats.lse_tau[self.first : self.last]


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


def _scope(teacher: TeacherBatch, sample_mask: Tensor, spec: LossSpec) -> Tensor | None:
    assert teacher.input_ids is not None and teacher.token_mask is not None
    return counted_rows(teacher.input_ids, teacher.token_mask, sample_mask)[2] if spec.topk_scope == "sequence" else None


def teacher_within(
    source: Source, first: int, last: int, active: Tensor, index: Tensor, length: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """A teacher's logits [last - first, k] within K, and their log-sum-exp / τ [last - first]; see `gather_columns`."""
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


class ChunkTerm:
    """What the terms across tokenizers share: the teacher's rows and the chunks."""

    def __init__(self, teacher: TeacherBatch, source: Source, sample_mask: Tensor, spec: LossSpec):
        self.spec, self.source = spec, source
        self.student, self.teacher = chunk_rows(teacher, sample_mask, spec)
        self.chunks = self.student.first.shape[0]
        self.active = self.student.active
        self.teacher_range = (0, source.rows)
        """Teacher rows of the tile's chunks; `tiles.py` narrows it."""


class ProjectedTerm(ChunkTerm):
    """p_kl."""

    def __init__(
        self, teacher: TeacherBatch, source: Source, length: int, student_vocab: int, sample_mask: Tensor, spec: LossSpec
    ):
        super().__init__(teacher, source, sample_mask, spec)
        assert teacher.projection is not None
        self.batch, self.sample_mask, self.projection = teacher, sample_mask, teacher.projection
        self.student_vocab = student_vocab
        self.length, self.teacher_length = length, teacher.logits.shape[1]
        self.indices = self.projection.indices[:student_vocab].contiguous()
        self.weights = self.projection.weights.detach()[:student_vocab].contiguous()
        self.learnable = self.projection.weights
        self.table = by_teacher(self.projection, student_vocab, source.vocab)
        self.kl = torch.empty(self.chunks, device=self.active.device)

    def prepare(self) -> None:
        """Chooses K; from hidden states that is one product of the teacher's size."""
        columns, place = choose_columns(self.batch, self.source, _scope(self.batch, self.sample_mask, self.spec), self.spec)
        self.columns = ordered_columns(columns, place, self.table)
        self.by_column = by_column(self.projection, self.student_vocab, self.source.vocab)
        self.place = self.columns.place
        self.reach = int(self.table.most[columns.shape[1] - 1])
        """No more of the student's columns can be touched."""

    def tile(self, tile: Tile, touched: Touched | None) -> SparseGradient:
        """Chunks of the tile: their KL and G."""
        assert touched is not None
        spec, (first, last) = self.spec, self.teacher_range
        within, lse = teacher_within(
            self.source, first, last, self.teacher.active, self.columns.index, self.teacher_length, spec.temperature
        )
        mass = project(
            tile.logits, tile.first, self.active, tile.lse_tau, self.columns, self.table, self.by_column, touched, self.length,
            spec.temperature,
        )  # fmt: skip
        return chunk_kl(
            mass, self.student, tile.first, within, lse, self.teacher, first, self.kl, spec.temperature, spec.reverse_kl,
            spec.chunk_distribution == "first",
        )  # fmt: skip

    def sums(self) -> tuple[Tensor, Tensor | None]:
        """What adds up to the KD, without τ²."""
        return self.kl, None


@functools.lru_cache(maxsize=8)
def _identity(vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices and weights [V, 1] of the W that maps every token to itself."""
    with torch.inference_mode(False):
        return torch.arange(vocab, device=device)[:, None], torch.ones(vocab, 1, device=device)


class WithinTerm:
    """The same vocabulary, compared within K."""

    def __init__(self, teacher: TeacherBatch, source: Source | None, counted: Tensor, scope: Tensor, spec: LossSpec):
        self.spec, self.batch, self.source, self.active, self.scope = spec, teacher, source, counted, scope
        self.top_k = teacher.logits if isinstance(teacher.logits, TopKLogits) else None
        _, self.length, vocab = teacher.logits.shape
        self.indices, self.weights = _identity(vocab, counted.device)
        self.kl = torch.empty(counted.shape[0], device=counted.device)

    def prepare(self) -> None:
        """Chooses K."""
        spec, device = self.spec, self.active.device
        if self.source is None:
            batch, _, vocab = self.batch.logits.shape
            sets = 1 if spec.topk_scope == "batch" else batch
            self.index = top_columns(self.batch, spec).int().expand(sets, -1).contiguous()
            position = torch.arange(self.index.shape[1], dtype=torch.int32, device=device).expand(sets, -1)
            self.place = torch.full((sets, vocab), -1, dtype=torch.int32, device=device).scatter_(1, self.index.long(), position)
        else:
            mask = self.scope if spec.topk_scope == "sequence" else None
            self.index, self.place = choose_columns(self.batch, self.source, mask, spec)
        self.reach = self.index.shape[1]

    def tile(self, tile: Tile, touched: Touched | None) -> SparseGradient:
        """Rows of the tile: their KL and its derivative."""
        spec = self.spec
        if self.source is None:
            target = self._known(tile.first, tile.last)
            lse = within_lse(target, tile.first, self.active, spec.temperature)
        else:
            target, lse = teacher_within(
                self.source, tile.first, tile.last, self.active, self.index, self.length, spec.temperature
            )
        return within_kl(
            tile.logits, tile.first, self.active, self.index, target, lse, self.kl, self.length, spec.temperature, spec.reverse_kl,
            self.top_k is not None,
        )  # fmt: skip

    def _known(self, first: int, last: int) -> Tensor:
        """The teacher's top k laid out over K: [last - first, |K|], -inf where it is silent."""
        assert self.top_k is not None
        values = self.top_k.values.detach().flatten(0, 1)[first:last]
        held = self.top_k.indices.flatten(0, 1)[first:last].long()
        sets, width = self.index.shape
        which = torch.arange(first, last, device=held.device) // self.length % sets
        at = self.place[which[:, None], held].long()
        laid = values.new_full((last - first, width + 1), -torch.inf)
        return laid.scatter_(1, torch.where(at < 0, width, at), values)[:, :width].contiguous()

    def sums(self) -> tuple[Tensor, Tensor | None]:
        """What adds up to the KD, without τ²."""
        return self.kl, None


class WholeTerm:
    """The same vocabulary, compared whole: averaged logits, or K as large as the vocabulary."""

    def __init__(self, sources: tuple[Source, ...], weights: tuple[float, ...], counted: Tensor, spec: LossSpec):
        self.sources, self.weights, self.spec, self.active = sources, weights, spec, counted
        self.kl = torch.empty(counted.shape[0], device=counted.device)

    def tile(self, tile: Tile, touched: Touched | None) -> WholeGradient:
        """Rows of the tile: their KL."""
        parts = tuple(source.tile(tile.first, tile.last) for source in self.sources)
        return whole_kl(
            tile.logits,
            tile.first,
            self.active,
            tile.lse_tau,
            parts,
            self.weights,
            self.kl,
            self.spec.temperature,
            self.spec.reverse_kl,
        )

    def sums(self) -> tuple[Tensor, Tensor | None]:
        """What adds up to the KD, without τ²."""
        return self.kl, None


class CommonTerm(ChunkTerm):
    """gold and h_kl."""

    def __init__(self, teacher: TeacherBatch, source: Source, student_vocab: int, sample_mask: Tensor, spec: LossSpec):
        super().__init__(teacher, source, sample_mask, spec)
        assert teacher.projection is not None and teacher.mode is not None
        self.split = vocabulary_split(teacher.projection, teacher.mode, student_vocab, source.vocab)
        sizes = self.split.uncommon_student.numel(), self.split.uncommon_teacher.numel()
        self.depth = min(*sizes, spec.uncommon_topk)
        device = self.active.device
        self.stats = RowStats.empty(source.rows, spec.temperature, device)
        self.no_targets = torch.zeros(source.rows, dtype=torch.int64, device=device)
        self.kl_parts, self.slope_parts = torch.zeros(2, self.chunks, SPLIT, device=device)
        self.l1, self.signed = torch.zeros(2, self.chunks, device=device)
        self.sign = torch.zeros(self.chunks, sizes[0], dtype=torch.int8, device=device)

    def tile(self, tile: Tile, touched: Touched | None) -> CommonGradient:
        """Chunks of the tile: KL and L1."""
        tau, (first, last) = self.spec.temperature, self.teacher_range
        logits = self.source.tile(first, last)
        row_stats(logits, self.teacher.active, self.no_targets, self.stats, first, tau)
        lse = self.stats.lse_tau[first:last]
        common_kl(
            tile.logits, tile.first, tile.lse_tau, self.student, logits, first, lse, self.teacher, self.split.pair, tau,
            self.spec.reverse_kl, self.kl_parts, self.slope_parts,
        )  # fmt: skip
        sorted_distance(
            tile.logits, tile.first, tile.lse_tau, self.student, self.split.uncommon_student, logits, first, lse, self.teacher,
            self.split.uncommon_teacher, self.depth, tau, self.sign, self.l1, self.signed,
        )  # fmt: skip
        slope = self.slope_parts.sum(1) + self.signed
        return CommonGradient(self.split.pair, self.sign, slope, self.student, self.teacher, logits, first, lse)

    def sums(self) -> tuple[Tensor, Tensor | None]:
        """What adds up to the KL over common columns, and to the L1 over uncommon ones."""
        return self.kl_parts, self.l1


Term = ProjectedTerm | WithinTerm | WholeTerm | CommonTerm


def make_term(
    teacher: TeacherBatch, length: int, student_vocab: int, counted: Tensor, scope: Tensor, sample_mask: Tensor, spec: LossSpec
) -> Term:  # fmt: skip
    """The term of a teacher that `selection.resolve_teachers` returned. `length`: T_s; `counted`, `scope`: [R] bool, see `counted_rows`."""
    logits = as_form(teacher.logits)
    if isinstance(logits, AveragedLogits):
        return WholeTerm(tuple(Source.of(part) for part in logits.parts), logits.weights, counted, spec)
    if isinstance(logits, TopKLogits):
        return WithinTerm(teacher, None, counted, scope, spec)
    source = Source.of(logits)
    if teacher.projection is None:
        if spec.vocab_topk >= source.vocab:
            return WholeTerm((source,), (1.0,), counted, spec)
        return WithinTerm(teacher, source, counted, scope, spec)
    if teacher.mode == "p_kl":
        return ProjectedTerm(teacher, source, length, student_vocab, sample_mask, spec)
    return CommonTerm(teacher, source, student_vocab, sample_mask, spec)
