"""The score step: a teacher of a spec, run once over prepared rows."""

from __future__ import annotations

from pathlib import Path

import torch

from xtoken_core.data.reading import load_rows
from xtoken_core.errors import InputError
from xtoken_core.models import load_model, vocabulary_rows
from xtoken_core.spec import DistillationSpec
from xtoken_core.teachers.scores import ScoreSettings, rows_digest
from xtoken_core.teachers.scoring import score_rows
from xtoken_core.tokenization import TokenTable, load_tokenizer
from xtoken_core.training.scored import shared_rows
from xtoken_core.training.settings import compute_dtype
from xtoken_core.workflow.versions import model_version


def score_teacher(spec: DistillationSpec, teacher_id: str, rows: str | Path, folder: str | Path) -> int:
    """Writes what a teacher says of the training rows in `rows` (as prepare wrote them) to `folder`; the tokens scored.

    What an interrupted call has left there is kept, where it is of the same teacher, rows and settings. Raises InputError.
    """
    teacher = next((t for t in spec.teachers if t.id == teacher_id and t.scores is not None), None)
    if teacher is None or teacher.scores is None:
        known = [t.id for t in spec.teachers if t.scores is not None]
        raise InputError(f"teacher: {teacher_id}: one of {', '.join(known) or 'none'} has scores in the spec")
    table = TokenTable.from_tokenizer(load_tokenizer(spec.student.model, spec.student.tokenizer))
    ids, train, dtype = shared_rows(spec, table), load_rows(Path(rows) / "train"), compute_dtype(spec.training.precision)
    settings = ScoreSettings(
        teacher=model_version(teacher.model),
        rows=rows_digest(train),
        top_k=min(teacher.scores.top_k, ids),
        vocab_size=ids,
        temperature=spec.loss.temperature,
        dtype=str(dtype).removeprefix("torch."),
    )
    model = load_model(teacher.model, dtype, spec.training.attention)
    vocabulary_rows(model, ids, table.min_rows, teacher.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it untyped
    return score_rows(model, train, Path(folder), settings)
