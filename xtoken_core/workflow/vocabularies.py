"""The vocabularies of a run: their audit, and the projection W of every teacher."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtoken_core.errors import InputError
from xtoken_core.overlap import audit, overlap_matrix, resolve_mode, vocabulary_overlap
from xtoken_core.projection import Projection, build_projection
from xtoken_core.report.overlap_figure import overlap_figure
from xtoken_core.spec import DistillationSpec
from xtoken_core.tokenization import TokenTable, load_tokenizer

if TYPE_CHECKING:
    pass


def overlap_report(spec: DistillationSpec) -> dict[str, Any]:
    """Loads the tokenizers of a spec and compares each teacher's vocabulary with the student's.

    Returns a JSON-able dict: `student`; `teachers` by id, each with fingerprint, size, overlap, coverage by class, and
    the mode of its loss with the reason for it; `matrix`, the overlap of every pair. Raises InputError for a teacher
    without `projection` whose vocabulary is not the student's.
    """
    student = TokenTable.from_tokenizer(load_tokenizer(spec.student.model, spec.student.tokenizer))
    tables = {t.id: TokenTable.from_tokenizer(load_tokenizer(t.model, t.tokenizer)) for t in spec.teachers}
    teachers = {}
    for index, teacher in enumerate(spec.teachers):
        table = tables[teacher.id]
        if not teacher.cross_tokenizer and table.fingerprint != student.fingerprint:
            raise InputError(
                f"teachers.{index} ({teacher.id}): no projection, so it must have the student's vocabulary, but its fingerprint "
                f"is {table.fingerprint} and the student's is {student.fingerprint}"
            )
        coverage = audit(student, table)
        chosen = teacher.mode or spec.loss.mode
        if not teacher.cross_tokenizer:
            mode, reason = "same_vocabulary", "every id stands for the same bytes as the student's"
        elif chosen == "auto":
            mode, reason = resolve_mode(coverage)
        else:
            mode, reason = chosen, "set in the spec"
        teachers[teacher.id] = {
            "tokenizer": teacher.tokenizer or teacher.model,
            "fingerprint": table.fingerprint,
            "size": len(table),
            "same_vocabulary": not teacher.cross_tokenizer,
            **asdict(vocabulary_overlap(student, table)),
            "coverage": {name: {**asdict(c), "share": c.share} for name, c in coverage.items()},
            "mode": mode,
            "reason": reason,
        }
    return {
        "student": {
            "tokenizer": spec.student.tokenizer or spec.student.model,
            "fingerprint": student.fingerprint,
            "size": len(student),
        },
        "teachers": teachers,
        "matrix": {"names": ["student", *tables], "coefficient": overlap_matrix([student, *tables.values()]).tolist()},
    }


def compare_tokenizers(refs: Sequence[str], folder: str | Path) -> dict[str, Any]:
    """Compares any number of tokenizers, given as `load_tokenizer` takes them, each with each.

    Writes `overlap.json` (what is returned: names, fingerprints, sizes, `coefficient` [N][N]) and the heat map
    `overlap.png` to `folder`, which is made. Raises InputError.
    """
    tables = [TokenTable.from_tokenizer(load_tokenizer(ref)) for ref in refs]
    names = [ref.rstrip("/").rsplit("/", 1)[-1] for ref in refs]
    matrix = overlap_matrix(tables)
    found = {
        "names": names,
        "fingerprints": [table.fingerprint for table in tables],
        "sizes": [len(table) for table in tables],
        "coefficient": matrix.round(4).tolist(),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "overlap.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    overlap_figure(names, matrix).savefig(folder / "overlap.png", dpi=150)
    return found


def write_projection(spec: DistillationSpec, teacher_id: str, folder: str | Path) -> None:
    """Builds (or, with `projection.uri`, fetches and checks) W for one teacher of a spec; no id: the only one with a projection.

    Writes `projection.safetensors` and `stats.json` (`projection_summary`, with `seconds` and `options`) to `folder`.
    Raises InputError.
    """
    from xtoken_core.report.projection_summary import projection_summary

    start = time.perf_counter()
    projected = {t.id: (t, t.projection) for t in spec.teachers if t.projection is not None}
    if teacher_id not in projected and (teacher_id or len(projected) != 1):
        raise InputError(f"teacher: {teacher_id or 'not given'}: one of {', '.join(projected) or 'none'} is to be projected to")
    teacher, options = projected[teacher_id or next(iter(projected))]
    toks = load_tokenizer(spec.student.model, spec.student.tokenizer), load_tokenizer(teacher.model, teacher.tokenizer)
    tables = TokenTable.from_tokenizer(toks[0]), TokenTable.from_tokenizer(toks[1])
    if options.uri is None:
        projection = build_projection(*toks, options)
    else:
        projection = _fetch(options.uri, *tables)
    settings = options.model_dump(mode="json", exclude={"learnable", "learning_rate"})
    projection.save(Path(folder) / "projection.safetensors", tables[0].fingerprint, tables[1].fingerprint, settings)
    stats = {**projection_summary(projection, *tables), "options": settings, "seconds": round(time.perf_counter() - start, 3)}
    (Path(folder) / "stats.json").write_text(json.dumps(stats))


def _fetch(uri: str, student: TokenTable, teacher: TokenTable) -> Projection:
    from xtoken_core.storage import local_copy

    path = local_copy(uri)
    if uri.endswith(".safetensors"):
        return Projection.load(path, student, teacher)
    return Projection.from_nemo_rl(path, len(student), len(teacher))
