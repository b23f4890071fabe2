"""The score step: a teacher of a spec, run once over prepared rows."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtoken_core.checksums import note
from xtoken_core.configs import compute_dtype
from xtoken_core.data.reading import load_rows
from xtoken_core.data.rows import read_column
from xtoken_core.errors import InputError, blamed
from xtoken_core.losses import CellCut
from xtoken_core.models import load_model, vocabulary_rows
from xtoken_core.partition import Partition, build_partition
from xtoken_core.projection import Projection
from xtoken_core.spec import DistillationSpec, StudentSpec, TeacherSpec
from xtoken_core.teachers.scores import MEASURED, MeasuredRows, ScoreSettings, rows_digest
from xtoken_core.teachers.scoring import Cut, likeliest_cells, likeliest_tokens, measure_rows, score_rows
from xtoken_core.tokenization import TokenTable, load_tokenizer
from xtoken_core.workflow.model_checks import shared_rows
from xtoken_core.workflow.versions import model_version
from xtoken_core.workflow.views import View


def score_teacher(
    spec: DistillationSpec, teacher_id: str, rows: str | Path, folder: str | Path, projection: str | Path | None = None
) -> int:
    """Writes what a teacher says of the training rows in `rows` (as prepare wrote them) to `folder`; the tokens scored.

    projection: the file of W whose cells are scored, of a teacher of another vocabulary; None: those of the vocabularies alone.
    What an interrupted call has left there is kept, where it is of the same teacher, rows and settings. Raises InputError.
    """
    teacher = next((t for t in spec.teachers if t.id == teacher_id and t.scores is not None), None)
    if teacher is None or teacher.scores is None:
        known = [t.id for t in spec.teachers if t.scores is not None]
        raise InputError(f"teacher: {teacher_id}: one of {', '.join(known) or 'none'} has scores in the spec")
    student, column = _table(spec.student), f"{read_column(teacher)}_ids"
    train, dtype = load_rows(Path(rows) / "train"), compute_dtype(spec.training.precision)
    told = spec.shared_rows if isinstance(spec, View) else None
    domains = json.dumps(sorted(teacher.domains)) if teacher.domains else ""
    table = _table(teacher) if teacher.cross_tokenizer else student
    cells = _cells(student, table, projection) if teacher.cross_tokenizer else None
    settings = ScoreSettings(
        teacher=model_version(teacher.model),
        rows=rows_digest(train, column, domains),
        num_rows=len(train),
        top_k=0,
        vocab_size=len(table) if teacher.cross_tokenizer else min(len(student), told or shared_rows(spec)),
        temperature=spec.loss.temperature,
        dtype=str(dtype).removeprefix("torch."),
        domains=domains,
    )
    model = load_model(teacher.model, dtype, spec.training.attention)
    vocabulary_rows(model, settings.vocab_size, table.min_rows, teacher.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it untyped
    settings, cut = _classes(settings, teacher.scores.top_k, cells.to(device) if cells else None)
    with blamed(f"teachers.{teacher.id}"):
        tokens = score_rows(model, _Column(train, column, teacher.domains), Path(folder), settings, cut)
    if (Path(rows) / "validation").exists():
        _measure(model, load_rows(Path(rows) / "validation"), teacher, settings, Path(folder))
    return tokens


def _measure(model: Any, rows: Any, teacher: TeacherSpec, settings: ScoreSettings, folder: Path) -> None:
    """Writes beside the scores how well the teacher knows the validation rows of the domains that it teaches."""
    column = read_column(teacher)
    own = (row for row in rows if teacher.domains is None or row["domain"] in teacher.domains)
    found = measure_rows(model, own, column, settings.vocab_size)
    found = {domain: sums for domain, sums in found.items() if math.isfinite(sums[0])}  # as of a running teacher
    MeasuredRows(rows=rows_digest(rows, f"{column}_ids"), domains=found).write(folder / MEASURED)
    note(folder / MEASURED)


def _table(model: StudentSpec | TeacherSpec) -> TokenTable:
    return TokenTable.from_tokenizer(load_tokenizer(model.model, model.tokenizer))


def _cells(student: TokenTable, teacher: TokenTable, projection: str | Path | None) -> Partition:
    stored = None if projection is None else Projection.load(projection, student, teacher).cells
    return stored or build_partition(student, teacher)


def _classes(settings: ScoreSettings, top_k: int, cells: Partition | None) -> tuple[ScoreSettings, Cut]:
    """The settings with what is listed: at most `top_k` cells, or where there are none tokens; and the cut to them."""
    if cells is None:
        k = min(top_k, settings.vocab_size)
        return replace(settings, top_k=k), likeliest_tokens(k, settings.temperature)
    cut = CellCut.of(cells, settings.vocab_size, top_k, settings.temperature)
    return replace(settings, top_k=cut.k, cells=cells.digest(), num_cells=cells.num_cells), likeliest_cells(cut)


@dataclass(frozen=True)
class _Column(Sequence[Tensor]):
    """A column of prepared rows, each read when it is asked for; of rows of other `domains` nothing."""

    rows: Any
    name: str
    domains: Collection[str] | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        read = self.domains is None or row["domain"] in self.domains
        return torch.as_tensor(row[self.name][: None if read else 0]).long()
