"""Who is evaluated."""

from __future__ import annotations

from typing import Literal

from xtoken_core.results.record import Record


class Subject(Record):
    """Who an evaluation is of."""

    role: Literal["student", "baseline", "teacher"]
    """`baseline`: the student's twin, trained on cross-entropy only, with the same rows and steps."""
    state: Literal["before", "best", "last"] | None = None
    """Of a student: before distillation, or which checkpoint. Best: by validation."""
    teacher: str | None = None
    """Of a teacher: its id."""

    @property
    def key(self) -> str:
        """A name for files and metrics."""
        if self.role == "teacher":
            return f"teacher-{self.teacher}"
        return (
            f"student_{self.state}"
            if self.state == "before"
            else f"{'student_after' if self.role == 'student' else 'baseline'}_{self.state}"
        )


BEFORE = Subject(role="student", state="before")
BEST, LAST = (Subject(role="student", state=state) for state in ("best", "last"))
TWIN_BEST, TWIN_LAST = (Subject(role="baseline", state=state) for state in ("best", "last"))


def teacher_subject(teacher: str) -> Subject:
    """The teacher of this id as one who is evaluated."""
    return Subject(role="teacher", teacher=teacher)
