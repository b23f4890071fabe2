"""The vocabularies of a run: their audit, and the projection W of every teacher."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from xtoken_core.errors import InputError
from xtoken_core.overlap import audit, overlap_matrix, reason_for, resolve_mode, vocabulary_overlap
from xtoken_core.projection import make_projection
from xtoken_core.report.overlap_figure import overlap_figure
from xtoken_core.report.projection_summary import projection_summary
from xtoken_core.results.vocabulary import (
    ClassCoverage,
    Matrix,
    OverlapReport,
    ProjectionStats,
    TeacherVocabulary,
    TokenizerComparison,
    Vocabulary,
)
from xtoken_core.same_vocabulary import check_same_vocabulary
from xtoken_core.spec import DistillationSpec
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
        chosen = teacher.mode or spec.loss.mode
        if not teacher.cross_tokenizer:
            mode, reason = "same_vocabulary", "every id that stands for text stands for the same as the student's"
        elif chosen == "auto":
            mode, reason = resolve_mode(teacher)
        else:
            mode, reason = chosen, reason_for(chosen)
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


def write_projections(spec: DistillationSpec, folder: str | Path) -> None:
    """Builds (or, with `projection.uri`, fetches and checks) W of every teacher that the spec projects to.

    Writes `<teacher>.safetensors` and `<teacher>.json` (`ProjectionStats`) to `folder`, which is made. Raises InputError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    projected = [teacher.id for teacher in spec.teachers if teacher.projection is not None]
    if not projected:
        raise InputError("teachers: none has a projection")
    for teacher in projected:
        start = time.perf_counter()
        made = make_projection(spec, teacher)
        made.save(folder / f"{teacher}.safetensors")
        seconds = round(time.perf_counter() - start, 3)
        stats = projection_summary(made.projection, made.student, made.teacher, options=made.options, seconds=seconds)
        stats.write(folder / f"{teacher}.json")


def matrices(spec: DistillationSpec, folder: str | Path | None) -> dict[str, Path]:
    """The files of W by teacher id in a folder that `write_projections` wrote; none without a folder."""
    return {t.id: Path(folder) / f"{t.id}.safetensors" for t in spec.teachers if t.cross_tokenizer} if folder else {}


def projection_stats(spec: DistillationSpec, folder: str | Path) -> dict[str, ProjectionStats]:
    """The statistics of every W by teacher id, in such a folder. Raises InputError."""
    return {teacher: ProjectionStats.read(path.with_suffix(".json")) for teacher, path in matrices(spec, folder).items()}
