"""How far a student and a teacher predict the same, on rows that both can read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xtoken_core.data.batch import Collator
from xtoken_core.data.reading import load_rows
from xtoken_core.losses import StepTotals, StudentBatch, TeacherBatch, batch_counts, loss_metrics, loss_sums
from xtoken_core.models import Loaded, final_hidden, head_logits, load
from xtoken_core.projection import Projection
from xtoken_core.results.evaluation import Agreement
from xtoken_core.spec import DistillationSpec, TeacherSpec

BATCH_TOKENS = 1024
"""About how many positions get full logits at a time."""


@torch.no_grad()
def agreement(
    spec: DistillationSpec,
    student: Loaded,
    rows_folder: str | Path,
    projections: Mapping[str, Path | str],
    modes: Mapping[str, str],
) -> dict[str, Agreement]:
    """What each teacher and the student have in common, by teacher id.

    `kl`: the loss's own divergence, nats per chunk, or per token with the student's vocabulary. `top1`: at how many of the
    places where both begin a chunk (or token) their first choices are the same; of two vocabularies, where the teacher's is
    the first piece of the student's in W. `chunks`: how many were compared. `mode`: the loss mode.

    Args:
        spec: student, teachers and loss are read; each teacher counts by itself, whatever the aggregation.
        student: on its device.
        rows_folder: what `prepare_rows` wrote for validation.
        projections: file of W by id of each teacher of another vocabulary.
        modes: the loss mode by teacher id.
    """
    alone = {"aggregation": "sum", "weight_metric": None, "normalize_by_vocab": False, "dynamic_scaling": False}
    loss = spec.loss.model_copy(update=alone)
    rows, collate = load_rows(rows_folder), Collator.for_rows(spec, rows_folder)
    size = max(1, BATCH_TOKENS // spec.data.max_length)
    results = {}
    for index, teacher in enumerate(spec.teachers):
        model, other_ids, projection = _load(teacher, student, projections, spec.training.attention)
        own_ids = student.rows
        if projection is None:  # the ids that both have a row for
            own_ids = other_ids = min(own_ids, other_ids)
        mode = modes[teacher.id] if teacher.cross_tokenizer else None
        counts, sums = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        same = places = 0
        for start in range(0, len(rows), size):
            batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))]).to(student.model.device)
            theirs = batch.teachers[index]
            # full logits, formed once: both comparisons read them
            own = head_logits(student.model, final_hidden(student.model, batch.student.input_ids), own_ids).dense()
            other = head_logits(model, final_hidden(model, theirs.input_ids), other_ids).dense()
            chunks = {} if theirs.chunks is None else vars(theirs.chunks)
            seen = TeacherBatch(other, theirs.input_ids, theirs.token_mask, projection=projection, mode=mode, **chunks)
            part = batch_counts(*batch.masks, [seen], loss)
            counts += part.cpu()
            sums += loss_sums(StudentBatch.of(own, *batch.masks), [seen], loss, StepTotals.from_sums(part, [seen], loss)).cpu()
            agrees = _same_choice(own.argmax(-1), other.argmax(-1), seen, batch.student.token_mask)
            same, places = same + int(agrees.sum()), places + len(agrees)
        totals = StepTotals.from_sums(counts, [seen], loss)
        results[teacher.id] = Agreement(
            kl=float(loss_metrics(sums, totals, loss)["kl_loss_t0"]),
            top1=same / max(places, 1),
            chunks=int(totals.kd_counts[0]),
            mode=mode or "same_vocabulary",
        )
        del model  # the next teacher is loaded into their memory
    return results


def _load(
    teacher: TeacherSpec, student: Loaded, projections: Mapping[str, Path | str], attention: str
) -> tuple[PreTrainedModel, int, Projection | None]:
    """The teacher's model beside the student's, how many rows of its lm_head count, and W."""
    device = student.model.device
    other = load(teacher.model, teacher.tokenizer, f"teacher {teacher.id}", student.model.dtype, attention)
    other.model.to(device)  # type: ignore[arg-type]  # transformers wraps it untyped
    if not teacher.cross_tokenizer:
        return other.model, other.rows, None
    projection = Projection.load(projections[teacher.id], student.table, other.table)
    return other.model, other.rows, projection.to(device)


def _same_choice(student: Tensor, teacher: Tensor, seen: TeacherBatch, token_mask: Tensor) -> Tensor:
    """bool [n]: whether both put the same token first, at each place that both predict; student, teacher: first choices [B, T]."""
    if seen.projection is None:
        return (student == teacher)[:, :-1][token_mask[:, 1:] != 0]
    assert seen.student_chunk_id is not None and seen.teacher_chunk_id is not None and seen.chunk_valid is not None
    same = []
    for b, valid in enumerate(seen.chunk_valid):
        chunks = valid.nonzero()[:, 0]
        # the row before a chunk's first token predicts it
        own, other = (_first(ids[b], chunks) - 1 for ids in (seen.student_chunk_id, seen.teacher_chunk_id))
        same.append(seen.projection.indices[student[b, own], 0] == teacher[b, other])
    return torch.cat(same)


def _first(ids: Tensor, chunks: Tensor) -> Tensor:
    """[n]: position of the first token of each chunk in ids [T], which ascend but for -1 outside chunks."""
    inside = (ids >= 0).nonzero()[:, 0]
    return inside[torch.searchsorted(ids[inside].contiguous(), chunks)]
