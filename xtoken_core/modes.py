"""Which loss mode a teacher is compared by, and what was measured of the modes (tests/benchmarks/results)."""

from __future__ import annotations

from xtoken_core.spec import TeacherSpec

WORSE_THAN_CE = ("h_kl", "gold")
"""Modes that made a worse student than no distillation. They are published methods and still offered, with a word about it."""

NO_DISTANCES = ("h_kl", "gold")
"""Modes whose value is a score: it leaves out or adds mass, can be negative, and is not zero where the models agree."""


def mode_of(teacher: TeacherSpec, asked: str) -> tuple[str, str]:
    """The mode of a teacher, and why. asked: `loss.mode`, which stands where the teacher has no mode of its own.

    `auto` is what made the best student where it was measured; a W that is trained leaves no choice.
    """
    chosen = teacher.mode or asked
    if teacher.projection is None:
        return "same_vocabulary", "every id that stands for text stands for the same as the student's"
    if chosen == "auto" and teacher.projection.learnable:
        return "p_kl", "the one mode that trains W"
    if chosen == "auto":
        return "partition_kl", "the best student of all modes where it was measured"
    if chosen in WORSE_THAN_CE:
        return chosen, f"set in the spec, and worse than no distillation where it was measured: {chosen}"
    return chosen, "set in the spec"
