"""One optimizer step's loss over a global batch, however it is split: what training does, in small."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from tests.support.losses_cases import MODES, random_batch, random_teacher, scored
from xtoken_core.losses import (
    CellScores,
    HiddenLogits,
    StepTotals,
    StudentBatch,
    TeacherBatch,
    batch_counts,
    distillation_loss,
    dynamic_scale,
    loss_metrics,
    loss_sums,
)
from xtoken_core.losses.learnable import LearnableProjection
from xtoken_core.spec import LossSpec

SAMPLES, LENGTH, VOCAB, DIM = 8, 9, 11, 6

AGGREGATIONS = [
    {},
    {"weight_metric": "ce", "score_unit": "byte"},
    {"weight_metric": "ce", "normalize_by_vocab": True},
    {"weight_metric": "entropy"},
    {"weight_metric": "max_prob"},
    {"aggregation": "select_teacher"},
]
SPECS = [LossSpec(mode=mode, vocab_topk=5, temperature=1.5, **options) for mode in MODES for options in AGGREGATIONS] + [
    LossSpec(aggregation="averaged_logits"),
    LossSpec(mode="p_kl", chunk_distribution="first", reverse_kl=True, dynamic_scaling=False),
    LossSpec(mode="p_kl", exact_match_only=True, dynamic_scaling=False),
]


@dataclasses.dataclass
class Model:
    """The trained tensors: an lm_head over fixed hidden states, and the weights of teacher 0's W."""

    hidden: torch.Tensor
    head: torch.Tensor
    learnable: LearnableProjection

    @property
    def trained(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head, self.learnable.log_weights


def global_batch(spec: LossSpec) -> tuple[Model, tuple[torch.Tensor, ...], list[TeacherBatch]]:
    """Eight samples of unequal length; the third is masked out; the last two have no valid chunk and no counted token."""
    generator = torch.Generator().manual_seed(0)
    _, ids, mask, samples = random_batch(1, SAMPLES, LENGTH, VOCAB)
    lengths = torch.tensor([9, 6, 9, 8, 4, 7, 5, 3])
    mask = mask * (torch.arange(LENGTH) < lengths[:, None])
    mask[6:] = 0
    samples = torch.ones(SAMPLES).index_fill(0, torch.tensor([2]), 0)
    teachers = []
    for i, cross in enumerate((True, False, True)):
        cross = cross and spec.aggregation != "averaged_logits"
        teacher = random_teacher(i, SAMPLES, LENGTH, VOCAB, cross, weight=0.5 + i)
        if cross:
            outside = torch.arange(LENGTH) >= lengths[:, None]
            teacher = replace(teacher, student_chunk_id=teacher.student_chunk_id.masked_fill(outside, -1))
            teacher.chunk_valid[6:] = False
            teacher.token_mask[6:] = 0
        teachers.append(teacher)
    projection = random_teacher(0, SAMPLES, LENGTH, VOCAB, cross=True).projection
    hidden = torch.randn(SAMPLES, LENGTH, DIM, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCAB, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    return Model(hidden, head, LearnableProjection(projection).double()), (ids, mask, samples, lengths), teachers


def scored_teachers(teachers: Sequence[TeacherBatch], spec: LossSpec, k: int = 2) -> list[TeacherBatch]:
    """The same with those of another vocabulary known by their k likeliest cells."""
    return [t if t.projection is None else scored(t, k, spec.temperature) for t in teachers]


def cut(batch, teachers: Sequence[TeacherBatch], model: Model, kept: torch.Tensor):
    """A micro-batch: some of the samples, no longer than the longest of them."""
    ids, mask, samples, lengths = (x[kept] for x in batch)
    length = int(lengths.max())
    parts = []
    for i, teacher in enumerate(teachers):
        fields = {f.name: getattr(teacher, f.name) for f in dataclasses.fields(teacher)}
        form = fields["logits"]
        fields = {name: x[kept] for name, x in fields.items() if isinstance(x, torch.Tensor)}
        if isinstance(form, CellScores):
            fields["logits"] = form.over_positions(lambda x: x[kept])
        if teacher.projection is None:
            fields = {name: x[:, :length] if x.dim() > 1 else x for name, x in fields.items()}
        else:
            fields["student_chunk_id"] = fields["student_chunk_id"][:, :length]
            if i == 0:
                fields["projection"] = model.learnable()
        parts.append(replace(teacher, **fields))
    student = HiddenLogits(model.hidden[kept, :length], model.head)
    return (student, ids[:, :length], mask[:, :length], samples), parts


def step(
    spec: LossSpec,
    micro_batches: Sequence[Sequence[int]],
    group=None,
    scale: float | None = None,
    from_scores: bool = False,
    taught: Sequence[Sequence[int]] = (),
):
    """((loss, gradients...), metrics, next scale) of the global batch, from this rank's micro-batches. taught: the samples of each teacher."""
    model, batch, teachers = global_batch(spec)
    if taught:
        teachers = [replace(t, taught=torch.tensor(own) > 0) for t, own in zip(teachers, taught, strict=True)]
    if from_scores:
        teachers = scored_teachers(teachers, spec)

    def reduced(vectors):
        total = torch.stack(list(vectors)).sum(0)
        if group is not None:
            dist.all_reduce(total, group=group)
        return total

    parts = [cut(batch, teachers, model, torch.tensor(kept)) for kept in micro_batches]
    totals = StepTotals.from_sums(reduced(batch_counts(*b[1:], t, spec) for b, t in parts), teachers, spec, scale)
    if scale is None:
        measured = reduced(loss_sums(StudentBatch.of(*b), t, spec, totals) for b, t in parts)
        totals = totals.with_scale(dynamic_scale(measured, totals, spec))
    loss, sums = torch.zeros(1, dtype=torch.float64), []
    for student_batch, part in parts:
        out = distillation_loss(*student_batch, part, spec, totals=totals)
        out.loss.backward()
        loss += out.loss.detach()
        sums.append(out.sums)
    shares = [loss, *(torch.zeros_like(x).flatten() if x.grad is None else x.grad.flatten() for x in model.trained)]
    everything = reduced([torch.cat(shares)])
    sums = reduced(sums)
    sizes = [1, *(x.numel() for x in model.trained)]
    metrics = {name: float(value) for name, value in loss_metrics(sums, totals, spec).items()}
    return everything.split(sizes), metrics, float(dynamic_scale(sums, totals, spec))
