"""Who is evaluated, in which step."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from xtoken_core.errors import InputError
from xtoken_core.results.subject import BEFORE, BEST, LAST, TWIN_BEST, TWIN_LAST, Subject, teacher_subject
from xtoken_core.spec import DistillationSpec


class Group(StrEnum):
    """Those that one evaluation step measures: who is there at the same time."""

    TEACHERS = "teachers"
    BEFORE = "student-before"
    AFTER = "student-after"
    BASELINE = "baseline"

    @classmethod
    def named(cls, name: str) -> Self:
        """The group of this name. Raises InputError."""
        try:
            return cls(name)
        except ValueError:
            raise InputError(f"group: {name}: not one of {', '.join(cls)}") from None


def groups(spec: DistillationSpec) -> list[Group]:
    """The evaluation steps of a run; none without a measure."""
    if not (spec.evaluation.tasks or spec.measures_bits):
        return []
    return [group for group in Group if group is not Group.BASELINE or spec.evaluation.ce_baseline]


def subjects(spec: DistillationSpec, group: Group) -> list[Subject]:
    """Everybody of a group."""
    if group is Group.TEACHERS:
        return [teacher_subject(teacher.id) for teacher in spec.teachers]
    if group is Group.BEFORE:
        return [BEFORE]
    best, last = (BEST, LAST) if group is Group.AFTER else (TWIN_BEST, TWIN_LAST)
    return [best, last] if spec.data.validation else [last]
