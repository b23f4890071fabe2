"""gold and h_kl over common columns: the KL of every chunk between the two sides' mean log-probabilities at paired columns.

With l_v the student's mean log-probability of a chunk (n rows), f the chunk's loss and g_v = df/dl_v, the gradient of its row t is

    df / dz_tv = (g_v - p_tv Σ_u g_u) / (n τ)

where g_v = -exp(R) at a common column (R: the teacher's at its pair; reverse: exp(l)(l - R + 1)) and sign * exp(l) at an uncommon one
(`ranks.py`). It is dense, and `gradient.py` forms g_v again from the logits of both sides when it writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken_core.losses.kernels.chunks import Side, mean_log_prob
from xtoken_core.losses.kernels.launch import launch
from xtoken_core.losses.kernels.rows import readable, room
from xtoken_core.losses.tables import common_pairs
from xtoken_core.spec import LossSpec

if TYPE_CHECKING:
    from xtoken_core.projection import Projection

SPLIT = 16
"""Programs that share the columns of a chunk. They run side by side: few chunks at a time, so that the rows gathered from stay in the cache."""


@dataclass(frozen=True)
class Split:
    """The vocabulary split of one teacher: `selection.common_pairs` by student column."""

    pair: Tensor
    """[room for V_s] int32: the teacher's column paired with a student's; for the student's i-th uncommon column -1 - i; -1 beyond V_s."""
    uncommon_student: Tensor
    """[u] int32, ascending."""
    uncommon_teacher: Tensor
    """[w] int32, ascending."""


def vocabulary_split(projection: Projection, mode: str, student_vocab: int, teacher_vocab: int) -> Split:
    """Made once for a projection, a mode and these sizes."""
    return projection.weighted_table(_split, mode, student_vocab, teacher_vocab)


def _split(projection: Projection, mode: str, student_vocab: int, teacher_vocab: int) -> Split:
    pairs = common_pairs(projection, mode, student_vocab, teacher_vocab)
    pair = torch.full((room(student_vocab),), -1, dtype=torch.int32, device=pairs.student.device)
    pair[pairs.student] = pairs.teacher.int()
    rest = pairs.uncommon_student.int()
    pair[pairs.uncommon_student] = -1 - torch.arange(rest.numel(), dtype=torch.int32, device=rest.device)
    return Split(pair, rest, pairs.uncommon_teacher.int())


@triton.jit
def _common_kernel(student, teacher, num_rows, pair, readable, inv_tau, kl, slopes, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a chunk's KL and Σ g over every so-many-th block of the student's columns."""
    part, parts, chunk = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    first, last = tl.load(student.first + chunk), tl.load(student.last + chunk)
    if (first <= last) & (first >= student.tile) & (first < student.tile + num_rows):
        t_first, t_last = tl.load(teacher.first + chunk), tl.load(teacher.last + chunk)
        terms = tl.zeros([BLOCK], tl.float32)
        slope = tl.zeros([BLOCK], tl.float32)
        for v0 in range(part * BLOCK, readable, parts * BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            column = tl.load(pair + v, mask=v < readable, other=-1)
            common = column >= 0
            s = mean_log_prob(student, chunk, first, last, v, v < readable, inv_tau)
            t = mean_log_prob(teacher, chunk, t_first, t_last, column, common, inv_tau)
            if REVERSE:
                weight = tl.exp(s)
                terms += tl.where(common, weight * (s - t), 0.0)
                slope += tl.where(common, weight * (s - t + 1.0), 0.0)
            else:
                weight = tl.exp(t)
                terms += tl.where(common, weight * (t - s), 0.0)
                slope -= tl.where(common, weight, 0.0)
        tl.store(kl + chunk * parts + part, tl.sum(terms, 0))
        tl.store(slopes + chunk * parts + part, tl.sum(slope, 0))


def common_kl(student: Side, teacher: Side, pair: Tensor, kl: Tensor, slopes: Tensor, spec: LossSpec) -> None:
    """Fills kl and slopes [N, SPLIT] float32, to be summed, of the chunks whose student rows are in the tile.

    Args:
        student: the student's tile.
        teacher: the teacher's.
        pair: int32, see `Split`.
        kl: parts of Σ over common columns of the KL.
        slopes: parts of Σ_v g_v over common columns.
        spec: read for `temperature` and `reverse_kl`.
    """
    if kl.shape[0] == 0:
        return
    launch(
        _common_kernel,
        (kl.shape[1], kl.shape[0]),
        student,
        teacher,
        student.logits.shape[0],
        pair,
        readable(student.logits),
        1.0 / spec.temperature,
        kl,
        slopes,
        REVERSE=spec.reverse_kl,
        BLOCK=2048,
        num_warps=8,
    )


class CommonGradient(NamedTuple):
    """What `gradient.py` needs of a tile to write this teacher's part."""

    pair: Tensor
    """int32, see `Split`."""
    sign: Tensor
    """[N, u] int8: derivative of the L1 by each uncommon probability."""
    uncommon: int
    """u."""
    slope: Tensor
    """[N] float32: Σ_v g_v of each chunk."""
    student: Side
    teacher: Side
