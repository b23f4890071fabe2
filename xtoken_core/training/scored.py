"""Teachers of which only scores are there, as the training reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xtoken_core.checksums import check_whole, damage
from xtoken_core.data.reading import Check, load_rows
from xtoken_core.data.rows import read_column
from xtoken_core.errors import InputError, blamed
from xtoken_core.spec import DistillationSpec
from xtoken_core.storage import local_copy
from xtoken_core.teachers.scores import MEASURED, MeasuredRows, ScoredTeacher, Scores, rows_digest
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.training.teachers import ReadyTeacher


def check_classes(spec: DistillationSpec, teachers: Sequence[ReadyTeacher], scored: Sequence[ScoredTeacher | None]) -> None:
    """Raises InputError for scores of other classes than a teacher's loss compares, or made for another temperature."""
    for index, (teacher, read) in enumerate(zip(teachers, scored, strict=True)):
        name, cells = f"teachers.{index} ({teacher.id}): scores", teacher.projection and teacher.projection.cells
        if read is None:
            continue
        if teacher.mode not in (None, "partition_kl"):
            raise InputError(f"{name}: mode: {teacher.mode} needs the running teacher; scores serve partition_kl")
        if read.settings.cells != (cells.digest() if cells else ""):
            raise InputError(
                f"{name}: made for other cells than those of W; score again with it, or take theirs by projection.uri"
            )
        if cells and read.settings.temperature != spec.loss.temperature:
            asked, told = spec.loss.temperature, read.settings.temperature
            raise InputError(f"{name}: made for loss.temperature {told:g}, and this run's is {asked:g}")


def scored_teachers(spec: DistillationSpec, inputs: TrainingInputs) -> tuple[ScoredTeacher | None, ...]:
    """What stands for each teacher that has scores, in the spec's order; None for those that are run.

    Raises InputError for scores that are not there, damaged or of other rows; and for damaged ones that this run has made itself
    RunError, after it has removed them. Of several shards the first one's rows are compared here, and those of the others when they are
    fetched (`rows_check`).
    """
    found: list[ScoredTeacher | None] = []
    for index, teacher in enumerate(spec.teachers):
        if teacher.scores is None:
            found.append(None)
            continue
        name = f"teachers.{index} ({teacher.id}): scores"
        places = (teacher.scores.uri,) if teacher.scores.uri is not None else inputs.scores.get(teacher.id, ())
        if len(places) != len(inputs.rows):
            raise InputError(f"{name}: {len(places)} were given for {len(inputs.rows)} shards of rows")
        column = f"{read_column(teacher)}_ids"
        copies = [local_copy(str(place)) for place in places]
        if os.environ.get("LOCAL_RANK", "0") == "0":  # which reads every byte: of a host's ranks one does
            for copy in copies:
                _check_sealed(copy, name, own=teacher.scores.uri is None)
        with blamed(name):
            scored = ScoredTeacher([Scores(copy) for copy in copies], column)
        told, asked = scored.settings.domains, set(teacher.domains or ())
        if told and (not asked or asked - set(json.loads(told))):
            raise InputError(f"{name}: {places[0]}: made of the domains {', '.join(json.loads(told))} only")
        found.append(scored)
    if check := rows_check(spec, found):
        check(0, load_rows(local_copy(str(inputs.rows[0])) / "train"))
    return tuple(found)


def rows_check(spec: DistillationSpec, scored: Sequence[ScoredTeacher | None]) -> Check | None:
    """What every shard's rows are held to when they are read; None where no scores are."""

    def check(shard: int, rows: Any) -> None:
        for index, (teacher, read) in enumerate(zip(spec.teachers, scored)):
            if read is not None:
                with blamed(f"teachers.{index} ({teacher.id}): scores"):
                    read.check_rows(shard, rows)

    return check if any(scored) else None


def with_measurements(
    teachers: Sequence[ReadyTeacher], scored: Sequence[ScoredTeacher | None], validation: Any
) -> tuple[ReadyTeacher, ...]:
    """The teachers, those whose scores are read with how well they know the validation rows, if their scoring has measured that on these."""
    return tuple(
        teacher if read is None else replace(teacher, measured=_measured(read, validation))
        for teacher, read in zip(teachers, scored, strict=True)
    )


def _measured(read: ScoredTeacher, validation: Any) -> Mapping[str, tuple[float, float]]:
    file = read.shards[0].folder / MEASURED
    if validation is None or not file.exists():
        return {}
    found = MeasuredRows.read(file)
    return found.domains if found.rows == rows_digest(validation, read.column) else {}


def _check_sealed(folder: Path, name: str, own: bool) -> None:
    if not any(folder.glob("part-*")):
        raise InputError(f"{name}: {folder}: holds no scores")
    if own:
        check_whole(folder)
    elif damaged := damage(folder):
        raise InputError(f"{name}: {folder}: {damaged} is not as it was written; score these rows again")
