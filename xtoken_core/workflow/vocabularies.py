"""The vocabularies of a run: their audit, and the projection W of every teacher."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xtoken_core.data.rows import teacher_column
from xtoken_core.errors import InputError
from xtoken_core.first_tokens import FIRST_TOKENS, FirstTokens, read_first_tokens
from xtoken_core.modes import mode_of
from xtoken_core.overlap import audit, overlap_matrix, vocabulary_overlap
from xtoken_core.partition import join_cells, seen_together, share_apart
from xtoken_core.projection import MadeProjection, make_projection
from xtoken_core.report.overlap_figure import overlap_figure
from xtoken_core.report.projection_summary import projection_summary
from xtoken_core.results.vocabulary import (
    ClassCoverage,
    JoinedCells,
    Matrix,
    OverlapReport,
    ProjectionStats,
    TeacherVocabulary,
    TokenizerComparison,
    Vocabulary,
)
from xtoken_core.same_vocabulary import check_same_vocabulary
from xtoken_core.spec import DistillationSpec
from xtoken_core.storage import local_copy
from xtoken_core.tokenization import TokenTable, load_tokenizer


def overlap_report(spec: DistillationSpec) -> OverlapReport:
    """Loads the tokenizers of a spec and compares each teacher's vocabulary with the student's.

    Raises InputError for a teacher without `projection` whose vocabulary is not the student's.
    """
    student_tok = load_tokenizer(spec.student.model, spec.student.tokenizer)
    toks = {t.id: load_tokenizer(t.model, t.tokenizer) for t in spec.teachers}
    student, tables = TokenTable.from_tokenizer(student_tok), {i: TokenTable.from_tokenizer(tok) for i, tok in toks.items()}
    teachers = {}
    for index, teacher in enumerate(spec.teachers):
        table = tables[teacher.id]
        if not teacher.cross_tokenizer:
            check_same_vocabulary(student_tok, toks[teacher.id], f"teachers.{index} ({teacher.id})")
        coverage = audit(student, table)
        mode, reason = mode_of(teacher, spec.loss.mode)
        overlap = vocabulary_overlap(student, table)
        teachers[teacher.id] = TeacherVocabulary(
            tokenizer=teacher.tokenizer or teacher.model,
            fingerprint=table.fingerprint,
            size=len(table),
            same_vocabulary=not teacher.cross_tokenizer,
            shared=overlap.shared,
            coefficient=overlap.coefficient,
            coverage={name: ClassCoverage(tokens=c.tokens, covered=c.covered, share=c.share) for name, c in coverage.items()},
            mode=mode,
            reason=reason,
        )
    own = Vocabulary(tokenizer=spec.student.tokenizer or spec.student.model, fingerprint=student.fingerprint, size=len(student))
    pairs = overlap_matrix([student, *tables.values()]).tolist()
    return OverlapReport(student=own, teachers=teachers, matrix=Matrix(names=["student", *tables], coefficient=pairs))


def compare_tokenizers(refs: Sequence[str], folder: str | Path) -> TokenizerComparison:
    """Compares any number of tokenizers, given as `load_tokenizer` takes them, each with each.

    Writes `overlap.json` (what is returned) and the heat map `overlap.png` to `folder`, which is made. Raises InputError.
    """
    tables = [TokenTable.from_tokenizer(load_tokenizer(ref)) for ref in refs]
    names = [ref.rstrip("/").rsplit("/", 1)[-1] for ref in refs]
    matrix = overlap_matrix(tables)
    found = TokenizerComparison(
        names=names,
        fingerprints=[table.fingerprint for table in tables],
        sizes=[len(table) for table in tables],
        coefficient=matrix.round(4).tolist(),
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found.write(folder / "overlap.json")
    overlap_figure(names, matrix).savefig(folder / "overlap.png", dpi=150)
    return found


def write_projections(spec: DistillationSpec, folder: str | Path, rows: Sequence[str] = ()) -> None:
    """Builds (or, with `projection.uri`, fetches and checks) W of every teacher that the spec projects to.

    rows: folders or URIs of what prepare wrote, all shards. A W that is built has those cells joined that the training rows show
    together; without rows the cells are those of the vocabularies alone.
    Writes `<teacher>.safetensors` and `<teacher>.json` (`ProjectionStats`) to `folder`, which is made. Raises InputError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    projected = [teacher.id for teacher in spec.teachers if teacher.projection is not None]
    if not projected:
        raise InputError("teachers: none has a projection")
    built = any(teacher.projection is not None and teacher.projection.uri is None for teacher in spec.teachers)
    files = [local_copy(f"{shard.rstrip('/')}/train/{FIRST_TOKENS}") for shard in rows] if built else []
    for teacher in projected:
        start = time.perf_counter()
        made, joined = make_projection(spec, teacher), None
        if files and made.options["uri"] is None:
            first = FirstTokens.added(read_first_tokens(file, teacher_column(teacher)) for file in files)
            made, joined = _with_joined_cells(made, first, teacher)
        made.save(folder / f"{teacher}.safetensors")
        seconds = round(time.perf_counter() - start, 3)
        about = {"joined": joined, "options": made.options, "seconds": seconds}
        projection_summary(made.projection, made.student, made.teacher, **about).write(folder / f"{teacher}.json")


def _with_joined_cells(made: MadeProjection, first: FirstTokens, teacher: str) -> tuple[MadeProjection, JoinedCells]:
    """W with those cells joined that the first tokens show together, and what became of them."""
    own = made.projection.cells
    assert own is not None
    if len(first.count) and (first.student.max() >= len(own.student) or first.teacher.max() >= len(own.teacher)):
        raise InputError(f"rows: prepared for other vocabularies than those of the student and {teacher}")
    cells = join_cells(own, seen_together(own, first))
    found = JoinedCells(
        cells=own.num_cells,
        left=cells.num_cells,
        chunks=int(first.count.sum()),
        apart=round(share_apart(own, first), 6),
        apart_left=round(share_apart(cells, first), 6),
    )
    print(
        f"{teacher}: {own.num_cells:,} cells, {cells.num_cells:,} once joined by the rows; a chunk's first tokens lie in different ones "
        f"in {100 * found.apart:.2f} % of {found.chunks:,} chunks, once joined in {100 * found.apart_left:.2f} %",
        flush=True,
    )
    return replace(made, projection=replace(made.projection, cells=cells)), found


def matrices(spec: DistillationSpec, folder: str | Path | None) -> dict[str, Path]:
    """The files of W by teacher id in a folder that `write_projections` wrote; none without a folder."""
    return {t.id: Path(folder) / f"{t.id}.safetensors" for t in spec.teachers if t.cross_tokenizer} if folder else {}


def projection_stats(spec: DistillationSpec, folder: str | Path) -> dict[str, ProjectionStats]:
    """The statistics of every W by teacher id, in such a folder. Raises InputError."""
    return {teacher: ProjectionStats.read(path.with_suffix(".json")) for teacher, path in matrices(spec, folder).items()}
