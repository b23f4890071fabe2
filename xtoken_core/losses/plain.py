"""The losses in vectorised PyTorch with autograd: the path on CPU and where Triton is missing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xtoken_core.losses import partition_listed
from xtoken_core.losses.logits import Logits, TopKLogits, as_form
from xtoken_core.losses.partition_tiles import partition_kl
from xtoken_core.losses.selection import EPSILON, FLOOR, chunk_rows, next_token_ids, next_token_mask, top_columns
from xtoken_core.losses.tables import common_pairs, projection_entries
from xtoken_core.losses.types import Coefficients, StudentBatch, TeacherBatch, TermSums
from xtoken_core.spec import LossSpec


def term_sums(
    student: StudentBatch, teachers: Sequence[TeacherBatch], spec: LossSpec, coefficients: Coefficients | None = None
) -> TermSums:
    """CE and each teacher's KD over one batch, as sums that add up over any split of the batch into samples.

    Everything that is decided over a global batch (counts, weights, the selected teacher, the scale) comes before and after,
    in `aggregation`; a term here depends on its own samples alone. (`topk_scope: batch` chooses columns over the samples given.)

    Args:
        student: its logits and what they are to predict.
        teachers: only those whose KD is wanted, as `resolve.resolve_teachers` returns them: `mode` is set for cross-tokenizer
            teachers and None for others, `input_ids` and `token_mask` are set, logits have no columns of padding.
            AveragedLogits are compared over the full vocabulary, whatever `spec.vocab_topk`.
        spec: read for temperature, chunk_distribution, topk_scope, vocab_topk, uncommon_topk, reverse_kl, exact_match_only.
        coefficients: factors of the sums in the loss, where known. An implementation may then form the gradient of `total` while it
            runs forward, and only `total` is differentiable. Without, `ce` and `kd` are, each with any upstream gradient.

    Returns:
        TermSums in float32, or float64 if the student's logits are. Differentiable with respect to the student's logits (or hidden
        states, lm_head weight and bias) and, through p_kl, to `projection.weights`; never to the teachers' logits. Computed in float32 at
        least: logits of lower precision are upcast, gradients are rounded once to the dtype of their tensor.
    """
    logits = _promoted(student.logits.dense())
    log_probs = {1.0: logits.log_softmax(-1)}
    if spec.temperature not in log_probs:
        log_probs[spec.temperature] = (logits / spec.temperature).log_softmax(-1)

    counted = next_token_mask(student.token_mask, student.sample_mask)
    targets = next_token_ids(student.input_ids)
    chosen = log_probs[1.0].gather(2, targets[..., None]).squeeze(2)
    ce = -chosen[counted].sum()
    with torch.no_grad():
        correct = ((logits.argmax(-1) == targets) & counted).sum()

    zero = ce.new_zeros(())
    kd, common, uncommon = [], [], []
    for teacher in teachers:
        parts = zero, zero
        if teacher.projection is None:
            assert teacher.token_mask is not None
            taught = next_token_mask(teacher.token_mask, student.sample_mask)
            value = _same_vocabulary(logits, log_probs[spec.temperature], teacher, taught, spec)
        elif teacher.mode == "partition_kl" and as_form(teacher.logits).of_cells and spec.temperature == 1.0:
            value = partition_listed.partition_kl(log_probs[1.0], chosen, student, teacher, spec)
        elif teacher.mode == "partition_kl":
            value = partition_kl(student, teacher, spec)
        elif teacher.mode == "p_kl":
            value = _p_kl(log_probs[spec.temperature], teacher, student.sample_mask, spec)
        else:
            parts = _common_and_uncommon(log_probs[spec.temperature], teacher, student.sample_mask, spec)
            value = parts[0] + parts[1]
        kd.append(value if teacher.mode == "partition_kl" else value * spec.temperature**2)
        common.append(parts[0].detach())
        uncommon.append(parts[1].detach())

    kd_sums, common_sums, uncommon_sums = (torch.stack(x) if x else ce.new_zeros(0) for x in (kd, common, uncommon))
    if coefficients is None:
        return TermSums(ce, kd_sums, correct, common_sums, uncommon_sums)
    total = coefficients.ce * ce + (coefficients.kd * kd_sums).sum()
    return TermSums(ce.detach(), kd_sums.detach(), correct, common_sums, uncommon_sums, total.to(ce.dtype))


def sample_logits(logits: Logits, b: int, columns: Tensor | None = None) -> Tensor:
    """[T, k]: sample b's logits of some columns (None: all), without gradient, in float32 at least."""
    return _promoted(as_form(logits).at(b, slice(None), columns).detach())


def _promoted(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def divergence(student: Tensor, teacher: Tensor, reverse: bool) -> Tensor:
    """[n, k] log-probabilities of both -> [n]: Σ exp(t)(t - s), KL(teacher || student); reverse: Σ exp(s)(s - t)."""
    if reverse:
        student, teacher = teacher, student
    return (teacher.exp() * (teacher - student)).sum(-1)


def _same_vocabulary(logits: Tensor, log_probs: Tensor, teacher: TeacherBatch, counted: Tensor, spec: LossSpec) -> Tensor:
    """Sum over the counted tokens of the KL within K."""
    form = as_form(teacher.logits)
    if isinstance(form, TopKLogits):
        return _same_vocabulary_top_k(logits, teacher, form, counted, spec)
    vocab = logits.shape[-1]
    full = form.whole or spec.vocab_topk >= vocab
    columns = None if full else top_columns(teacher, spec)
    total = logits.new_zeros(())
    for b in range(logits.shape[0]):
        rows = counted[b]
        k = None if columns is None else columns[b % columns.shape[0]]
        student = log_probs[b][rows] if k is None else (logits[b].index_select(1, k)[rows] / spec.temperature).log_softmax(-1)
        other = sample_logits(teacher.logits, b, k)[rows]
        total = total + divergence(student, (other / spec.temperature).log_softmax(-1), spec.reverse_kl).sum()
    return total


def _same_vocabulary_top_k(logits: Tensor, teacher: TeacherBatch, top: TopKLogits, counted: Tensor, spec: LossSpec) -> Tensor:
    """The same where only the teacher's k largest logits of each row are known: within K, over those that the row holds."""
    columns = top_columns(teacher, spec)
    inside = torch.zeros(columns.shape[0], logits.shape[-1], dtype=torch.bool, device=logits.device).scatter_(1, columns, True)
    held = top.indices.long()
    compared = inside.expand(logits.shape[0], -1).gather(1, held.flatten(1)).view(held.shape)
    counted = counted & compared.any(-1)
    compared = compared[counted]
    student = logits.gather(2, held)[counted] / spec.temperature
    target = top.values.detach().to(logits.dtype)[counted] / spec.temperature
    student, target = (x.masked_fill(~compared, -torch.inf).log_softmax(-1) for x in (student, target))
    return divergence(student.masked_fill(~compared, 0), target.masked_fill(~compared, 0), spec.reverse_kl).sum()


def _p_kl(log_probs: Tensor, teacher: TeacherBatch, sample_mask: Tensor, spec: LossSpec) -> Tensor:
    """Sum over the valid chunks of the KL between the projected student and the teacher within K.

    Only the student's columns that W maps into K are read, and averaged over a chunk's rows before they are projected: both are linear.
    """
    assert teacher.projection is not None
    batch, student_rows, student_vocab = log_probs.shape
    teacher_rows, teacher_vocab = teacher.logits.shape[1:]
    rows = chunk_rows(teacher, sample_mask, spec)
    entries = projection_entries(teacher.projection, student_vocab)
    weights = teacher.projection.weights.flatten()
    columns = top_columns(teacher, spec)
    total = log_probs.new_zeros(())
    for b in range(batch):
        k = columns[b % columns.shape[0]]
        place = torch.full((teacher_vocab,), -1, device=k.device).scatter_(0, k, torch.arange(k.numel(), device=k.device))
        reached = (place[entries.teacher] >= 0).nonzero().squeeze(1)
        touched, entry = entries.student[reached].unique(return_inverse=True)
        student_chunk, teacher_chunk, count = _compact(
            rows.student.view(batch, student_rows)[b], rows.teacher.view(batch, teacher_rows)[b]
        )
        probs = _chunk_mean(log_probs[b].index_select(1, touched).exp(), student_chunk, count)
        weight = weights[entries.slot[reached]].to(probs.dtype)
        mass = probs.new_zeros(k.numel(), count).index_add(0, place[entries.teacher[reached]], probs.T[entry] * weight[:, None]).T
        r = _chunk_mean((sample_logits(teacher.logits, b, k) / spec.temperature).log_softmax(-1), teacher_chunk, count)
        if spec.chunk_distribution == "mean":
            log_q = (mass / (mass.sum(-1, keepdim=True) + EPSILON) + EPSILON).log()
        else:
            log_q = (mass / mass.sum(-1, keepdim=True).clamp(min=FLOOR)).clamp(min=FLOOR).log()
        total = total + divergence(log_q, r, spec.reverse_kl).sum()
    return total


def _common_and_uncommon(log_probs: Tensor, teacher: TeacherBatch, sample_mask: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """gold and h_kl: sums over the valid chunks of the KL over common columns and of the L1 between sorted uncommon ones."""
    assert teacher.projection is not None and teacher.mode is not None
    batch, student_rows, student_vocab = log_probs.shape
    teacher_rows, teacher_vocab = teacher.logits.shape[1:]
    rows = chunk_rows(teacher, sample_mask, spec)
    pairs = common_pairs(teacher.projection, teacher.mode, student_vocab, teacher_vocab)
    depth = min(pairs.uncommon_student.numel(), pairs.uncommon_teacher.numel(), spec.uncommon_topk)
    kl = l1 = log_probs.new_zeros(())
    for b in range(batch):
        student_chunk, teacher_chunk, count = _compact(
            rows.student.view(batch, student_rows)[b], rows.teacher.view(batch, teacher_rows)[b]
        )
        s = _chunk_mean(log_probs[b], student_chunk, count)
        t = _chunk_mean((sample_logits(teacher.logits, b) / spec.temperature).log_softmax(-1), teacher_chunk, count)
        common = s.index_select(1, pairs.student), t.index_select(1, pairs.teacher)
        kl = kl + divergence(*common, spec.reverse_kl).sum()
        s_rest = s.index_select(1, pairs.uncommon_student).exp()
        t_rest = t.index_select(1, pairs.uncommon_teacher).exp()
        l1 = l1 + (_descending(s_rest, depth) - _descending(t_rest, depth)).abs().sum()
    return kl, l1


def _compact(student_chunk: Tensor, teacher_chunk: Tensor) -> tuple[Tensor, Tensor, int]:
    """Numbers a sequence's valid chunks 0..n-1: both sides' [T] with n in place of -1, and n."""
    valid, number = torch.cat([student_chunk, teacher_chunk]).unique(return_inverse=True)
    none = int((valid < 0).sum())
    count = valid.numel() - none
    number = torch.where(number < none, count, number - none)
    return number[: student_chunk.numel()], number[student_chunk.numel() :], count


def _chunk_mean(rows: Tensor, chunk: Tensor, count: int) -> Tensor:
    """[T, k], [T] chunk numbers (count: none) -> [count, k]: the mean of each chunk's rows."""
    size = torch.bincount(chunk, minlength=count + 1)[:count]
    total = rows.new_zeros(count + 1, rows.shape[1]).index_add(0, chunk, rows)[:count]
    return total / size[:, None]


def _descending(probs: Tensor, k: int) -> Tensor:
    """[n, v] of nonnegative numbers -> [n, k]: the k largest of each row, largest first; of equal ones the lowest index first.

    On CPU in float32 by one sort of (complement of the number's bits, index) in NumPy, whose vectorised sort is some 20 times torch's.
    """
    if k == 0 or probs.shape[0] == 0:
        return probs[:, :k]
    if probs.device.type == "cpu" and probs.dtype == torch.float32:
        bits = probs.detach().contiguous().view(torch.int32).long()
        keys = (((2**31 - 1 - bits) << 32) | torch.arange(probs.shape[1])).numpy()
        if k < keys.shape[1]:
            keys = np.ascontiguousarray(np.partition(keys, k - 1, axis=1)[:, :k])
        keys.sort(axis=1)
        order = torch.from_numpy(keys) & (2**32 - 1)
    else:
        order = probs.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return probs.gather(1, order)
