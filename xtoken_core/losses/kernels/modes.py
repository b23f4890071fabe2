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
    rest = None if coefficients is None else Coefficients(coefficients.ce, coefficients.kd[others])
    sums = term_sums_of_others(student, [teachers[i] for i in others], spec, rest)
    with torch.autocast(student.logits.device.type, enabled=False):
        found = {i: _partition_kl(student, teachers[i], spec).to(sums.ce.dtype) for i in ours} | dict(zip(others, sums.kd))
    kd = torch.stack([found[i] for i in range(len(teachers))])
    common, uncommon = (_spread(x, others, len(teachers)) for x in (sums.common, sums.uncommon))
    if coefficients is None:
        return TermSums(sums.ce, kd, sums.correct, common, uncommon)
    assert sums.total is not None
    total = sums.total + (coefficients.kd[ours] * kd[ours]).sum().to(sums.total.dtype)
    return TermSums(sums.ce, kd.detach(), sums.correct, common, uncommon, total)


def _partition_kl(student: StudentBatch, teacher: TeacherBatch, spec: LossSpec) -> Tensor:
    known = partition.takes(student, teacher, spec)
    return partition_kl(student, teacher, spec, partition.sum_and_gradients if known else sum_and_gradients)


def _spread(values: Tensor, places: Sequence[int], count: int) -> Tensor:
    """[count]: the values at their places, 0 elsewhere."""
    return values.new_zeros(count).index_copy(0, torch.tensor(places, dtype=torch.int64, device=values.device), values)
