"""A batch as the kernels take it: rows, terms, tables of touched columns, and the tiles it is cut into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken_core.losses.kernels.chunks import chunk_rows
from xtoken_core.losses.kernels.gradient import Factors, write_gradient
from xtoken_core.losses.kernels.projected import SparseGradient
from xtoken_core.losses.kernels.rows import RowStats, Tile, room, row_stats
from xtoken_core.losses.kernels.rowsets import Counted, counted_rows
from xtoken_core.losses.kernels.sources import Source, StudentRows
from xtoken_core.losses.kernels.terms import ProjectedTerm, Term, WithinTerm, make_term
from xtoken_core.losses.kernels.tile_gradient import TileGradient
from xtoken_core.losses.kernels.tiles import Cuts, TileRows, whole_batch
from xtoken_core.losses.kernels.totals import batch_totals
from xtoken_core.losses.kernels.touched import Placed, Touched, mark, placed_entries, touched_tokens
from xtoken_core.losses.kernels.weights import weight_gradient
from xtoken_core.losses.kernels.whole import WholeGradient
from xtoken_core.losses.logits import LogitsForm, as_form
from xtoken_core.losses.types import StudentBatch, TeacherBatch
from xtoken_core.spec import LossSpec

Use = Callable[[Tile, TileGradient], None]


@dataclass(frozen=True)
class Batch:
    """A batch made ready. `run` does the work, as often as asked."""

    student: LogitsForm
    rows: StudentRows
    terms: list[Term]
    touched: Touched | None
    """The student's columns that W maps into K, over all teachers."""
    placed: dict[int, Placed]
    """By term: W's entries at these columns."""
    tiles: list[TileRows]
    stats: RowStats
    spec: LossSpec

    @classmethod
    def of(cls, student: StudentBatch, teachers: Sequence[TeacherBatch], spec: LossSpec) -> Batch:
        """Where there is more than one tile the host waits once, at the end, for where they may be cut; the device chooses K meanwhile."""
        source, length = Source.of(student.logits), student.logits.shape[1]
        counted = counted_rows(student.input_ids, student.token_mask, student.sample_mask)
        chunks = [None if t.projection is None else chunk_rows(t, student.sample_mask, spec) for t in teachers]
        cuts = Cuts(source.rows, chunks) if _forms_logits(source, teachers) else None
        taught = [_taught(student, teacher, counted) for teacher in teachers]
        terms = [make_term(*given, source.vocab, length, spec) for given in zip(teachers, chunks, taught, strict=True)]
        active = counted.counted
        for pair in chunks:
            active = active if pair is None else active | pair[0].active
        touched, placed = _tables(terms, source.vocab, active.device)
        tiles = whole_batch(source.rows, chunks) if cuts is None else cuts.tiles()
        rows = StudentRows(source, counted.counted, active, counted.targets, length)
        stats = RowStats.empty(source.rows, spec.temperature, active.device)
        return cls(student.logits, rows, terms, touched, placed, tiles, stats, spec)

    @property
    def learnable(self) -> list[tuple[int, Tensor]]:
        """The weights of every W that learns, by term."""
        return [(i, t.learnable) for i, t in enumerate(self.terms) if isinstance(t, ProjectedTerm) and t.learnable.requires_grad]

    def run(self, use: Use | None = None) -> None:
        """Computes all terms' sums; `use` is called with every tile and what its gradient needs."""
        for rows in self.tiles:
            tile, parts = self._run_tile(rows)
            if use is not None:
                use(tile, parts)

    def _run_tile(self, rows: TileRows) -> tuple[Tile, TileGradient]:
        logits = self.rows.source.tile(rows.first, rows.last)
        row_stats(logits, self.rows.active, self.rows.targets, self.stats, rows.first, self.spec.temperature)
        tile, parts = Tile(rows.first, rows.last, logits, self.stats), TileGradient(touched=self.touched)
        for i, (term, own) in enumerate(zip(self.terms, rows.by_term, strict=True)):
            part = term.tile(tile, own, self.touched)
            if isinstance(part, SparseGradient):
                parts.sparse.append((i, part, self.placed[i], isinstance(term, ProjectedTerm)))
            elif isinstance(part, WholeGradient):
                parts.whole.append((i, part))
            else:
                parts.common.append((i, part))
        return tile, parts

    def write_gradient(self, tile: Tile, parts: TileGradient, out: Tensor, factors: Factors) -> None:
        """Writes a tile's gradient by its raw logits to `out`; see `gradient.write_gradient`."""
        write_gradient(tile, out, self.rows, parts, factors, self.spec)

    def add_weight_gradients(self, tile: Tile, parts: TileGradient, kd: Tensor, into: dict[int, Tensor]) -> None:
        """Adds a tile's derivative by the weights of every W that learns to `into`, by term."""
        tau, learnable = self.spec.temperature, dict(self.learnable)
        for i, sparse, placed, _ in parts.sparse:
            if i in learnable:
                assert self.touched is not None
                found = weight_gradient(tile, sparse, self.touched, placed, self.rows.length, tau)
                found *= kd[i] * tau**2
                into[i] = into[i] + found if i in into else found

    def totals(self) -> Tensor:
        """See `batch_totals`."""
        sums = [term.sums() for term in self.terms]
        return batch_totals(self.rows.counted, self.rows.targets, self.stats, sums, self.spec.temperature)


def _taught(student: StudentBatch, teacher: TeacherBatch, counted: Counted) -> Counted:
    """The student's rows that count for a teacher of its vocabulary: all that count, or where the teacher's own mask says."""
    if teacher.projection is not None or teacher.token_mask is None or teacher.token_mask is student.token_mask:
        return counted
    return counted_rows(student.input_ids, teacher.token_mask, student.sample_mask)


def _forms_logits(student: Source, teachers: Sequence[TeacherBatch]) -> bool:
    """Whether whole rows of logits have to be formed from hidden states: then a tile at a time. (Those of p_kl are formed within K.)"""
    common = [Source.of(as_form(t.logits)) for t in teachers if t.projection is not None and t.mode != "p_kl"]
    return any(source.dense is None for source in [student, *common])


def _tables(terms: Sequence[Term], vocab: int, device: torch.device) -> tuple[Touched | None, dict[int, Placed]]:
    sparse = {i: t for i, t in enumerate(terms) if isinstance(t, ProjectedTerm | WithinTerm)}
    if not sparse:
        return None, {}
    sets = next(iter(sparse.values())).place.shape[0]
    flag = torch.empty(sets, room(vocab), dtype=torch.int32, device=device)
    for number, term in enumerate(sparse.values()):
        mark(flag, term.indices, term.place, number == 0)
    limit = min(flag.shape[1], sum(term.reach for term in sparse.values()))
    touched = touched_tokens(flag, limit)
    return touched, {i: placed_entries(touched, t.indices, t.weights, t.place) for i, t in sparse.items()}
