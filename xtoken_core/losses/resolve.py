"""Teachers as the losses take them: nothing left open, and nothing that contradicts the spec or the vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from xtoken_core.errors import InputError
from xtoken_core.losses.cell_scores import CellScores
from xtoken_core.losses.logits import LogitsForm, as_form
from xtoken_core.losses.tables import projection_entries
from xtoken_core.losses.types import TeacherBatch
from xtoken_core.partition import Partition
from xtoken_core.spec import LossSpec


def resolve_teachers(
    teachers: Sequence[TeacherBatch], input_ids: Tensor, token_mask: Tensor, spec: LossSpec
) -> list[TeacherBatch]:
    """The teachers with nothing left open: mode chosen, a same-vocabulary teacher's ids and mask filled in, padded columns cut off,
    masked where they do not teach.

    Raises InputError where a teacher contradicts the spec, and for a cross-tokenizer teacher whose mode is `auto`.
    """
    return [_resolve(f"teacher {i}", teacher, input_ids, token_mask, spec) for i, teacher in enumerate(teachers)]


def _resolve(name: str, teacher: TeacherBatch, input_ids: Tensor, token_mask: Tensor, spec: LossSpec) -> TeacherBatch:
    logits = as_form(teacher.logits)
    if teacher.projection is None:
        if logits.of_cells:
            raise InputError(f"{name}: scores of cells are of a teacher with a projection")
        if spec.aggregation == "averaged_logits" and not logits.complete:
            raise InputError(f"{name}: aggregation: averaged_logits needs full logits, not their top k")
        own = token_mask if teacher.token_mask is None else teacher.token_mask
        own = own if teacher.taught is None else own * teacher.taught[:, None]
        return replace(teacher, logits=logits, input_ids=input_ids, token_mask=own, mode=None)
    mode = teacher.mode or spec.mode
    if mode == "auto":
        raise InputError(f"{name}: mode: auto is resolved before the loss, by the overlap step")
    if mode == "partition_kl" and teacher.projection.cells is None:
        raise InputError(
            f"{name}: mode: partition_kl needs the cells of both vocabularies, and this projection was stored without"
        )
    if spec.exact_match_only and mode != "p_kl":
        raise InputError(f"{name}: mode: {mode} contradicts exact_match_only, which is p_kl's")
    if spec.aggregation == "averaged_logits":
        raise InputError(f"{name}: aggregation: averaged_logits needs teachers with the student's vocabulary")
    if logits.of_cells:
        _check_cells(name, mode, logits, teacher.projection.cells)
    elif not logits.complete:
        raise InputError(f"{name}: a cross-tokenizer teacher needs full logits, not their top k")
    ids = teacher.projection.teacher_vocab_size  # an lm_head may have more rows than its tokenizer has ids
    teacher = replace(teacher, logits=logits if ids is None else logits.cut(ids), mode=mode)
    if teacher.taught is None:
        return teacher
    assert teacher.chunk_valid is not None
    return replace(teacher, chunk_valid=teacher.chunk_valid & teacher.taught[:, None])


def untaught_samples(sample_mask: Tensor, teachers: Sequence[TeacherBatch]) -> Tensor | None:
    """[B] like `sample_mask`: those of its samples that none of the teachers teaches. None: there are none, or no teachers."""
    flags = [teacher.taught for teacher in teachers if teacher.taught is not None]
    if not flags or len(flags) < len(teachers):
        return None
    return sample_mask * ~torch.stack(flags).any(0)


def _check_cells(name: str, mode: str, scores: LogitsForm, cells: Partition | None) -> None:
    """Raises InputError for scores that the mode cannot read, or that are of other cells."""
    if mode != "partition_kl":
        raise InputError(f"{name}: mode: {mode} needs the running teacher; scores of cells serve partition_kl only")
    assert isinstance(scores, CellScores) and cells is not None
    if scores.num_cells != cells.num_cells:
        raise InputError(f"{name}: scores of {scores.num_cells} cells, and these two vocabularies have {cells.num_cells}")


def check_vocabularies(teachers: Sequence[TeacherBatch], student_vocab: int) -> None:
    """Raises InputError unless the student's and the teachers' logits have the columns that the projections speak of."""
    for i, teacher in enumerate(teachers):
        vocab = teacher.logits.shape[-1]
        if teacher.projection is None:
            if vocab != student_vocab:
                raise InputError(
                    f"teacher {i}: no projection, yet its logits have {vocab} columns and the student's {student_vocab}"
                )
        elif (rows := teacher.projection.indices.shape[0]) < student_vocab:
            raise InputError(
                f"teacher {i}: projection: {rows} rows, fewer than the {student_vocab} columns of the student's logits"
            )
        elif projection_entries(teacher.projection, student_vocab).columns > vocab:
            raise InputError(f"teacher {i}: projection: points beyond the {vocab} columns of the teacher's logits")


def check_sample_mask(sample_mask: Tensor) -> None:
    """Raises InputError unless every sample of [B] counts or does not: a fraction would count whole in one term, by half in another."""
    if not sample_mask.is_floating_point() or (sample_mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    fractions = sample_mask[(sample_mask != 0) & (sample_mask != 1)]
    if len(fractions):
        raise InputError(f"sample_mask: {fractions[0]:g} is neither 0 nor 1; weigh teachers, not samples")
