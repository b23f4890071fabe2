"""One teacher's KD as the kernels compute it: what is known of a batch, and what is done with each tile of rows.

Every term has `active` (student rows that carry gradient), `tile(...)`, which computes a tile's KD and returns what the gradient pass
needs, and `sums()`: what adds up to the KD.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from xtoken_core.losses.kernels.choose import ordered_columns
from xtoken_core.losses.kernels.chunks import Rows, Side
from xtoken_core.losses.kernels.columns import within_lse
from xtoken_core.losses.kernels.common import SPLIT, CommonGradient, common_kl, vocabulary_split
from xtoken_core.losses.kernels.project import project
from xtoken_core.losses.kernels.projected import SparseGradient, chunk_kl
from xtoken_core.losses.kernels.ranks import Signs, sorted_distance
from xtoken_core.losses.kernels.rows import RowStats, Tile, row_stats
from xtoken_core.losses.kernels.rowsets import Counted, counted_rows
from xtoken_core.losses.kernels.sources import Source
from xtoken_core.losses.kernels.teacher_columns import choose_columns, teacher_within
from xtoken_core.losses.kernels.tiles import Range
from xtoken_core.losses.kernels.touched import Touched, by_column, by_teacher
from xtoken_core.losses.kernels.whole import WholeGradient, whole_kl
from xtoken_core.losses.kernels.within import Target, within_kl
from xtoken_core.losses.logits import AveragedLogits, TopKLogits, as_form
from xtoken_core.losses.selection import top_columns
from xtoken_core.losses.types import TeacherBatch
from xtoken_core.spec import LossSpec


class ProjectedTerm:
    """p_kl. K is chosen at once: from hidden states that is one product of the teacher's size."""

    def __init__(self, teacher: TeacherBatch, chunks: tuple[Rows, Rows], student_vocab: int, length: int, spec: LossSpec):
        """`length`: T_s."""
        projection = teacher.projection
        assert projection is not None and teacher.input_ids is not None and teacher.token_mask is not None
        self.spec, self.length, self.teacher_length = spec, length, teacher.logits.shape[1]
        self.source = Source.of(as_form(teacher.logits))
        self.student, self.teacher = chunks
        self.active = self.student.active
        self.indices = projection.indices[:student_vocab].contiguous()
        self.weights = projection.weights.detach()[:student_vocab].contiguous()
        self.learnable = projection.weights
        every = torch.ones(teacher.input_ids.shape[0], dtype=torch.bool, device=self.active.device)
        scope = counted_rows(teacher.input_ids, teacher.token_mask, every).scope if spec.topk_scope == "sequence" else None
        columns, place = choose_columns(teacher, self.source, scope, spec)
        table = by_teacher(projection, student_vocab, self.source.vocab)
        self.columns = ordered_columns(columns, place, table, by_column(projection, student_vocab, self.source.vocab))
        self.place = self.columns.place
        self.reach = int(table.most[columns.shape[1] - 1])
        """No more of the student's columns can be touched."""
        self.kl = torch.empty(self.student.first.shape[0], device=self.active.device)

    def tile(self, tile: Tile, rows: Range, touched: Touched | None) -> SparseGradient:
        """Chunks of the tile: their KL and G. `rows`: the teacher's."""
        assert touched is not None
        tau = self.spec.temperature
        within, lse = teacher_within(self.source, rows, self.teacher.active, self.columns.index, self.teacher_length, tau)
        mass = project(tile, self.active, self.columns, touched, self.length, tau)
        return chunk_kl(mass, tile.first, self.student, Side.of(within, rows[0], lse, self.teacher), self.kl, self.spec)

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

    def __init__(self, teacher: TeacherBatch, counted: Counted, spec: LossSpec):
        self.spec, self.active = spec, counted.counted
        batch, self.length, vocab = teacher.logits.shape
        form, device = as_form(teacher.logits), self.active.device
        self.top_k = form if isinstance(form, TopKLogits) else None
        self.indices, self.weights = _identity(vocab, device)
        self.kl = torch.empty(self.active.shape[0], device=device)
        if self.top_k is None:
            self.source = Source.of(form)
            mask = counted.scope if spec.topk_scope == "sequence" else None
            self.index, self.place = choose_columns(teacher, self.source, mask, spec)
        else:
            sets = 1 if spec.topk_scope == "batch" else batch
            self.index = top_columns(teacher, spec).int().expand(sets, -1).contiguous()
            position = torch.arange(self.index.shape[1], dtype=torch.int32, device=device).expand(sets, -1)
            self.place = torch.full((sets, vocab), -1, dtype=torch.int32, device=device).scatter_(1, self.index.long(), position)
        self.reach = self.index.shape[1]

    def tile(self, tile: Tile, rows: Range, touched: Touched | None) -> SparseGradient:
        """Rows of the tile: their KL and its derivative."""
        tau = self.spec.temperature
        if self.top_k is None:
            logits, lse = teacher_within(self.source, rows, self.active, self.index, self.length, tau)
        else:
            logits = self._known(self.top_k, rows)
            lse = within_lse(logits, tile.first, self.active, tau)
        target = Target(logits, lse, self.index, self.top_k is not None)
        return within_kl(tile, self.active, target, self.kl, self.length, self.spec)

    def _known(self, top_k: TopKLogits, rows: Range) -> Tensor:
        """The teacher's top k laid out over K: [n, |K|], -inf where it is silent."""
        first, last = rows
        values = top_k.values.detach().flatten(0, 1)[first:last]
        held = top_k.indices.flatten(0, 1)[first:last].long()
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

    def __init__(self, sources: tuple[Source, ...], weights: tuple[float, ...], counted: Counted, spec: LossSpec):
        self.sources, self.weights, self.spec, self.active = sources, weights, spec, counted.counted
        self.kl = torch.empty(self.active.shape[0], device=self.active.device)

    def tile(self, tile: Tile, rows: Range, touched: Touched | None) -> WholeGradient:
        """Rows of the tile: their KL."""
        parts = tuple(source.tile(*rows) for source in self.sources)
        return whole_kl(tile, self.active, parts, self.weights, self.kl, self.spec)

    def sums(self) -> tuple[Tensor, Tensor | None]:
        """What adds up to the KD, without τ²."""
        return self.kl, None


class CommonTerm:
    """gold and h_kl."""

    def __init__(self, teacher: TeacherBatch, chunks: tuple[Rows, Rows], student_vocab: int, spec: LossSpec):
        assert teacher.projection is not None and teacher.mode is not None
        self.spec, self.source = spec, Source.of(as_form(teacher.logits))
        self.student, self.teacher = chunks
        self.active = self.student.active
        self.split = vocabulary_split(teacher.projection, teacher.mode, student_vocab, self.source.vocab)
        sizes = self.split.uncommon_student.numel(), self.split.uncommon_teacher.numel()
        self.depth = min(*sizes, spec.uncommon_topk)
        device, count = self.active.device, self.student.first.shape[0]
        self.stats = RowStats.empty(self.source.rows, spec.temperature, device)
        self.no_targets = torch.zeros(self.source.rows, dtype=torch.int64, device=device)
        self.kl_parts, self.slope_parts = torch.zeros(2, count, SPLIT, device=device)
        sign = torch.zeros(count, sizes[0], dtype=torch.int8, device=device)
        self.signs = Signs(sign, *torch.zeros(2, count, device=device))

    def tile(self, tile: Tile, rows: Range, touched: Touched | None) -> CommonGradient:
        """Chunks of the tile: KL and L1. `rows`: the teacher's."""
        spec, (first, last) = self.spec, rows
        logits = self.source.tile(first, last)
        row_stats(logits, self.teacher.active, self.no_targets, self.stats, first, spec.temperature)
        student = Side.of(tile.logits, tile.first, tile.lse_tau, self.student)
        teacher = Side.of(logits, first, self.stats.lse_tau[first:last], self.teacher)
        common_kl(student, teacher, self.split.pair, self.kl_parts, self.slope_parts, spec)
        sorted_distance(student, teacher, self.split, self.depth, spec.temperature, self.signs)
        slope = self.slope_parts.sum(1) + self.signs.signed
        return CommonGradient(self.split.pair, self.signs.sign, self.signs.sign.shape[1], slope, student, teacher)

    def sums(self) -> tuple[Tensor, Tensor | None]:
        """What adds up to the KL over common columns, and to the L1 over uncommon ones."""
        return self.kl_parts, self.signs.l1


Term = ProjectedTerm | WithinTerm | WholeTerm | CommonTerm


def make_term(
    teacher: TeacherBatch, chunks: tuple[Rows, Rows] | None, counted: Counted, student_vocab: int, length: int, spec: LossSpec
) -> Term:
    """The term of a teacher that `resolve.resolve_teachers` returned.

    `chunks`: `chunk_rows` of one across tokenizers. `counted`: the student's rows. `length`: T_s.
    """
    form = as_form(teacher.logits)
    if isinstance(form, AveragedLogits):
        return WholeTerm(tuple(Source.of(part) for part in form.parts), form.weights, counted, spec)
    if chunks is None:
        if form.complete and spec.vocab_topk >= form.shape[2]:
            return WholeTerm((Source.of(form),), (1.0,), counted, spec)
        return WithinTerm(teacher, counted, spec)
    if teacher.mode == "p_kl":
        return ProjectedTerm(teacher, chunks, student_vocab, length, spec)
    return CommonTerm(teacher, chunks, student_vocab, spec)
