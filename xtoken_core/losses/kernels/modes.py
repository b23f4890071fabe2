"""`term_sums` for teachers of every mode: those of partition_kl, which has kernels of its own, beside all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xtoken_core.losses.kernels import partition
from xtoken_core.losses.kernels.autograd import term_sums as term_sums_of_others
from xtoken_core.losses.partition_tiles import partition_kl, sum_and_gradients
from xtoken_core.losses.types import Coefficients, StudentBatch, TeacherBatch, TermSums
from xtoken_core.spec import LossSpec


def term_sums(
    student: StudentBatch, teachers: Sequence[TeacherBatch], spec: LossSpec, coefficients: Coefficients | None = None
) -> TermSums:
    """As `plain.term_sums`, by the kernels; partition_kl of what they do not know in PyTorch, tile by tile. Student's logits in float32,
    bfloat16 or float16."""
    ours = [i for i, teacher in enumerate(teachers) if teacher.mode == "partition_kl"]
    if not ours:
        return term_sums_of_others(student, teachers, spec, coefficients)
    others = [i for i in range(len(teachers)) if i not in ours]
    with torch.autocast(student.logits.device.type, enabled=False):
        if coefficients is not None and not others and partition.takes(student, teachers[0], spec):
            return _with_cross_entropy(student, teachers, spec, coefficients)
        found = {i: _partition_kl(student, teachers[i], spec, None if coefficients is None else coefficients.kd[i]) for i in ours}
    rest = None if coefficients is None else Coefficients(coefficients.ce, coefficients.kd[others])
    sums = term_sums_of_others(student, [teachers[i] for i in others], spec, rest)
    by_teacher = {i: value.to(sums.ce.dtype) for i, (value, _) in found.items()} | dict(zip(others, sums.kd))
    kd = torch.stack([by_teacher[i] for i in range(len(teachers))])
    common, uncommon = (_spread(x, others, len(teachers)) for x in (sums.common, sums.uncommon))
    if sums.total is None:
        return TermSums(sums.ce, kd, sums.correct, common, uncommon)
    total = sums.total + sum(part.to(sums.total.dtype) for _, part in found.values())
    return TermSums(sums.ce, kd.detach(), sums.correct, common, uncommon, total)


def _with_cross_entropy(
    student: StudentBatch, teachers: Sequence[TeacherBatch], spec: LossSpec, coefficients: Coefficients
) -> TermSums:
    """Teachers of partition_kl only: cross-entropy and the first one's come from the same logits."""
    sums, total = partition.weighted_sums(student, teachers[0], spec, coefficients.kd[0], coefficients.ce)
    found = [_partition_kl(student, t, spec, kd) for t, kd in zip(teachers[1:], coefficients.kd[1:])]
    sums = sums.float()
    kd = torch.stack([sums[0], *(value.to(sums.dtype) for value, _ in found)]).detach()
    nothing = torch.zeros_like(kd)
    return TermSums(sums[1], kd, sums[2], nothing, nothing, total + sum(part.to(total.dtype) for _, part in found))


def _partition_kl(student: StudentBatch, teacher: TeacherBatch, spec: LossSpec, kd: Tensor | None) -> tuple[Tensor, Tensor]:
    """partition_kl, differentiable unless `kd` is given; then kd times it, which is."""
    known = partition.takes(student, teacher, spec)
    if known and kd is not None:
        sums, part = partition.weighted_sums(student, teacher, spec, kd, None)
        return sums[0], part
    value = partition_kl(student, teacher, spec, partition.sum_and_gradients if known else sum_and_gradients)
    return value, value if kd is None else kd * value


def _spread(values: Tensor, places: Sequence[int], count: int) -> Tensor:
    """[count]: the values at their places, 0 elsewhere."""
    return values.new_zeros(count).index_copy(0, torch.tensor(places, dtype=torch.int64, device=values.device), values)
