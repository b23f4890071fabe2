"""What a run will take: rows, tokens, memory, downloads, GPU hours and disk, from configurations and file sizes only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from xtoken_core import storage
from xtoken_core.configs import stored_dtype
from xtoken_core.costs import (
    BYTES_PER_TOKEN,
    STEP_BYTES,
    ModelSize,
    checkpoint_bytes,
    evaluation_bytes,
    host_bytes,
    row_bytes,
    score_bytes,
)
from xtoken_core.errors import InputError
from xtoken_core.report.run import Run
from xtoken_core.results.plan import Plan, PlannedModel, PlannedTask
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.plan_speed import (
    Sizes,
    Speed,
    gpus_of,
    model_refs,
    model_sizes,
    running,
    step_shape,
    trained_weights,
    training_flops,
)
from xtoken_core.workflow.plan_tasks import Planned
from xtoken_core.workflow.rungs import as_candidate, one_host


def plan(spec: DistillationSpec, finished: Run | None = None) -> Plan:
    """Figures of a run before it runs; with the speed, and the bytes per token, of a `finished` run where one is given. If that has read
    the same data with the same tokenizers, its rows and tokens are taken as they were counted.

    Raises InputError for models and data that are not there.
    """
    if finished is not None:
        _check_figures(finished)
    sizes = model_sizes(spec)
    counted = _same_rows(spec, finished)
    rows = _rows(spec, finished) if counted is None else counted.rows
    steps = spec.training.max_steps if spec.training.epochs is None else None if rows is None else spec.training.steps(rows)
    seen = None if steps is None else steps * spec.training.global_batch_size
    speed = Speed.of(spec, sizes, finished, counted.tokens_of_a_row if counted is not None else None)
    tokens = None if steps is None else speed.tokens(spec, steps)
    flops = None if tokens is None else training_flops(spec, sizes, tokens)
    hours = None if steps is None else speed.training(spec, sizes, steps)
    all_tokens = counted.tokens if counted is not None else None if rows is None else rows * spec.data.max_length
    tasks = Planned(spec, sizes, speed, steps, all_tokens, _held_out(spec, finished)).tasks()
    return Plan(
        steps=steps,
        counted=counted is not None,
        rows_at_least=rows,
        training_tokens_at_most=tokens,
        epochs_at_most=None if seen is None or not rows else round(seen / rows, 2),
        models=[_planned(field, ref, sizes[field]) for field, ref in model_refs(spec).items()],
        memory=_memory(spec, sizes),
        host_memory=_host_memory(spec, sizes),
        flops=flops,
        gpu_hours=None if hours is None else round(hours, 3),
        speed=speed.told,
        tasks=[_rounded(task) for task in tasks],
        disk_bytes=_disk(spec, sizes, all_tokens or 0),
    )


def _check_figures(finished: Run) -> None:
    """Raises InputError for a run.json of others with figures that no finished run has, and that would be divided by."""
    parts = {"prepare.train": finished.prepare.get("train"), "summary": finished.summary}
    for name, fields in {"prepare.train": ("rows", "bytes", "student_tokens"), "summary": ("steps", "tokens", "ranks")}.items():
        for field in fields if parts[name] is not None else ():
            if (value := getattr(parts[name], field)) <= 0:
                raise InputError(f"{finished.name}: {name}.{field}: {value} is a figure of no finished run")


@dataclass(frozen=True)
class _Counted:
    """What a finished run has counted of the same data."""

    rows: int
    tokens: int
    """The student's, of all rows."""
    tokens_of_a_row: float
    """Mean over the rows that its training has seen."""


def _same_rows(spec: DistillationSpec, finished: Run | None) -> _Counted | None:
    """None unless the finished run has read the same data with the same tokenizers, and trained on these rows one by one."""
    found = finished and finished.prepare.get("train")
    if finished is None or not found or spec.data.packing:
        return None
    theirs = finished.as_spec()
    if theirs.data != spec.data or _tokenizers(theirs) != _tokenizers(spec):
        return None
    done = finished.summary
    seen = done.steps * theirs.training.global_batch_size if done else 0
    return _Counted(found.rows, found.student_tokens, done.tokens / seen if done and seen else found.student_tokens / found.rows)


def _tokenizers(spec: DistillationSpec) -> set[tuple[str, str | None]]:
    teachers = {(teacher.model, teacher.tokenizer) for teacher in spec.teachers if teacher.cross_tokenizer}
    return {(spec.student.model, spec.student.tokenizer)} | teachers


def _rows(spec: DistillationSpec, finished: Run | None) -> int | None:
    """Rows of the training data, if all were full; None where its size is unknown."""
    tokens = _tokens(spec.data.train_uris, finished)
    if tokens is None:
        return None
    rows = math.ceil(tokens / spec.data.max_length)
    return rows if spec.data.max_rows is None else min(rows, spec.data.max_rows)


def _held_out(spec: DistillationSpec, finished: Run | None) -> int | None:
    """Tokens of the text that bits per byte are measured on."""
    found = _tokens(spec.evaluation.texts or spec.data.validation, finished)
    return None if found is None else round(found)


def _tokens(uris: Sequence[str], finished: Run | None) -> float | None:
    """Of the files at `uris`, of a width that a finished run has shown; None where their size is unknown."""
    counted = finished.prepare.get("train") if finished is not None else None
    width = BYTES_PER_TOKEN if counted is None else counted.bytes / max(counted.student_tokens, 1)
    try:
        return sum(storage.size(uri) for uri in storage.expand(uris)) / width
    except InputError:
        return None


def _rounded(task: PlannedTask) -> PlannedTask:
    return task if task.gpu_hours is None else task.model_copy(update={"gpu_hours": round(task.gpu_hours, 4)})


def _planned(field: str, ref: str, size: ModelSize) -> PlannedModel:
    try:
        files = storage.size(ref)
    except InputError:  # a hub id
        files = size.parameters * stored_dtype(ref).itemsize
    return PlannedModel(field=field, model=ref, parameters=size.parameters, active=size.active, download_bytes=files)


def _memory(spec: DistillationSpec, sizes: Sizes) -> dict[str, int]:
    """Bytes by step. Teachers that do not fit together on the GPU take turns: the largest counts."""
    width = 4 if spec.training.precision == "fp32" else 2
    row = spec.data.max_length
    own, heard = _training_memory(spec, sizes)
    found = {
        "overlap": STEP_BYTES,
        "projections": STEP_BYTES,
        "prepare": STEP_BYTES,
        "distill": round(own + max(heard, default=0)),
        "distill-teachers-resident": round(own + sum(heard)),
        "evaluate": max(evaluation_bytes(compared, width, row) for compared in _compared(sizes)),
    }
    scored = [sizes[f"teachers.{t.id}.model"] for t in spec.teachers if t.computes_scores]
    if scored:
        found["score"] = round(max(size.scoring_bytes(row, width) for size in scored))
    if spec.pilot is not None:
        tried = [as_candidate(spec, candidate) for candidate in spec.pilot.candidates]
        taken = [_training_memory(one_host(short), sizes) for short in tried]
        found |= {"audit": STEP_BYTES, "trial": round(max(own + max(heard, default=0) for own, heard in taken))}
    return found


def _training_memory(spec: DistillationSpec, sizes: Sizes) -> tuple[float, list[float]]:
    """Bytes on a GPU of the student's training, and of each teacher that runs in it."""
    width = 4 if spec.training.precision == "fp32" else 2
    shape = step_shape(spec, sizes)
    own = sizes["student.model"].student_bytes(shape, width, gpus_of(spec) if spec.training.sharding == "fsdp" else 1)
    return own, [
        size.teacher_bytes(shape, width, fp8) for size, fp8 in zip(running(spec, sizes).values(), shape.fp8, strict=True)
    ]


def _host_memory(spec: DistillationSpec, sizes: Sizes) -> dict[str, int]:
    """Bytes of the host's memory by kind of evaluation. The student's holds one teacher at a time beside it, for the agreement."""
    gpu, row = spec.resources.gpus_per_node > 0, spec.data.max_length
    teacher, student = (host_bytes(models, gpu, row) for models in _compared(sizes))
    return {"teacher": teacher, "student": student}


def _compared(sizes: Sizes) -> tuple[list[ModelSize], list[ModelSize]]:
    """What an evaluation of teachers holds at a time, at most, and one of the student."""
    largest = max((size for field, size in sizes.items() if field != "student.model"), key=lambda size: size.parameters)
    return [largest], [sizes["student.model"], largest]


def _disk(spec: DistillationSpec, sizes: Sizes, tokens: int) -> dict[str, int]:
    """By what it is for. tokens: of all rows."""
    student = sizes["student.model"]
    weights = student.parameters * stored_dtype(spec.student.model).itemsize
    cross = sum(t.cross_tokenizer for t in spec.teachers)
    kept = 0 if spec.training.save_steps is None else 2  # the one being written, and the one before
    checkpoints = kept * checkpoint_bytes(trained_weights(spec, student))
    return {
        "rows": row_bytes(tokens, cross),
        "scores": sum(
            tokens * score_bytes(t.scores.top_k, spec.training.precision)
            for t in spec.teachers
            if t.scores is not None and t.computes_scores
        ),
        "projections": sum(student.rows * t.projection.top_k * 8 for t in spec.teachers if t.projection is not None),
        "checkpoints": checkpoints,
        "student": 2 * weights,
        **({"trial": weights + checkpoints} if spec.pilot is not None else {}),
        **({"twin": 2 * weights + checkpoints} if spec.evaluation.ce_baseline else {}),
    }
