"""Who is evaluated."""

from __future__ import annotations

from xtoken_core.spec import DistillationSpec


def evaluated(spec: DistillationSpec) -> list[str]:
    """Who is measured: student_before, student_after_best, student_after_last, baseline_..., teacher-<id>; none without a measure."""
    measure = spec.evaluation
    if not (measure.tasks or spec.measures_bits):
        return []
    checkpoints = ("best", "last") if spec.data.validation else ("last",)
    return [
        "student_before",
        *(f"student_after_{checkpoint}" for checkpoint in checkpoints),
        *(f"baseline_{checkpoint}" for checkpoint in checkpoints if measure.ce_baseline),
        *(f"teacher-{teacher.id}" for teacher in spec.teachers),
    ]
