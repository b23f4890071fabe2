"""What a run will take: rows, tokens, memory, downloads, GPU hours and disk, from configurations and file sizes only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from xtoken_core import storage
from xtoken_core.configs import empty_model, read_config, stored_dtype
from xtoken_core.costs import (
    BYTES_PER_TOKEN,
    STEP_BYTES,
    ModelSize,
    StepShape,
    evaluation_bytes,
    host_bytes,
    row_bytes,
    score_bytes,
    step_seconds,
)
from xtoken_core.errors import InputError
from xtoken_core.layers import prune_layers
from xtoken_core.report.run import Run
from xtoken_core.results.plan import Plan, PlannedModel
from xtoken_core.spec import DistillationSpec


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
    tokens = None if seen is None else round(seen * (spec.data.max_length if counted is None else counted.tokens_of_a_row))
    flops = None if tokens is None else training_flops(spec, sizes, tokens)
    hours, told = _hours(spec, sizes, steps, finished)
    return Plan(
        steps=steps,
        counted=counted is not None,
        rows_at_least=rows,
        training_tokens_at_most=tokens,
        epochs_at_most=None if seen is None or not rows else round(seen / rows, 2),
        models=[_planned(field, ref, sizes[field]) for field, ref in _refs(spec).items()],
        memory=_memory(spec, sizes),
        host_memory=_host_memory(spec, sizes),
        flops=flops,
        gpu_hours=None if hours is None else round(hours, 3),
        speed=told,
        disk_bytes=_disk(spec, sizes, rows, None if counted is None else counted.tokens),
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


def model_sizes(spec: DistillationSpec) -> dict[str, ModelSize]:
    """Sizes of all models by the field that names them, the student's as it is trained. Raises InputError."""
    sizes = {}
    for field, ref in _refs(spec).items():
        model = empty_model(ref, read_config(ref))
        if field == "student.model" and spec.student.keep_layers is not None:
            prune_layers(model, spec.student.keep_layers)
        sizes[field] = ModelSize.of(model)
    return sizes


def training_flops(spec: DistillationSpec, sizes: Mapping[str, ModelSize], tokens: int) -> float:
    """Operations of a training on `tokens` of the student; every teacher that runs is taken to need as many."""
    row = spec.data.max_length
    size = sizes["student.model"]
    trained = None if spec.student.lora is None else _trained(spec, size)
    student = size.training_flops(tokens, row, spec.training.activation_checkpointing, trained)
    return student + sum(size.forward_flops(tokens, row) for size in _running(spec, sizes).values())


def _running(spec: DistillationSpec, sizes: Mapping[str, ModelSize]) -> dict[str, ModelSize]:
    """By id the teachers that run in the training, and are not read from scores."""
    return {t.id: sizes[f"teachers.{t.id}.model"] for t in spec.teachers if t.scores is None}


def _refs(spec: DistillationSpec) -> dict[str, str]:
    return {"student.model": spec.student.model} | {f"teachers.{t.id}.model": t.model for t in spec.teachers}


def _rows(spec: DistillationSpec, finished: Run | None) -> int | None:
    """Rows of the training data, if all were full; None where its size is unknown."""
    counted = finished.prepare.get("train") if finished is not None else None
    width = BYTES_PER_TOKEN if counted is None else counted.bytes / max(counted.student_tokens, 1)
    try:
        size = sum(storage.size(uri) for uri in storage.expand(spec.data.train_uris))
    except InputError:
        return None
    rows = math.ceil(size / width / spec.data.max_length)
    return rows if spec.data.max_rows is None else min(rows, spec.data.max_rows)


def _planned(field: str, ref: str, size: ModelSize) -> PlannedModel:
    try:
        files = storage.size(ref)
    except InputError:  # a hub id
        files = size.parameters * stored_dtype(ref).itemsize
    return PlannedModel(field=field, model=ref, parameters=size.parameters, active=size.active, download_bytes=files)


def _memory(spec: DistillationSpec, sizes: Mapping[str, ModelSize]) -> dict[str, int]:
    """Bytes by step. Teachers that do not fit together on the GPU take turns: the largest counts."""
    training, row = spec.training, spec.data.max_length
    width = 4 if training.precision == "fp32" else 2
    student = sizes["student.model"]
    shape = step_shape(spec, sizes)
    own = student.student_bytes(shape, width, _gpus(spec) if training.sharding == "fsdp" else 1)
    heard = [size.teacher_bytes(shape, width, fp8) for size, fp8 in zip(_running(spec, sizes).values(), shape.fp8, strict=True)]
    return {
        "overlap": STEP_BYTES,
        "projections": STEP_BYTES,
        "prepare": STEP_BYTES,
        "distill": round(own + max(heard, default=0)),
        "distill-teachers-resident": round(own + sum(heard)),
        "evaluate": max(evaluation_bytes(compared, width, row) for compared in _compared(sizes)),
    }


def _host_memory(spec: DistillationSpec, sizes: Mapping[str, ModelSize]) -> dict[str, int]:
    """Bytes of the host's memory by kind of evaluation. The student's holds one teacher at a time beside it, for the agreement."""
    gpu, row = spec.resources.gpus_per_node > 0, spec.data.max_length
    teacher, student = (host_bytes(models, gpu, row) for models in _compared(sizes))
    return {"teacher": teacher, "student": student}


def _compared(sizes: Mapping[str, ModelSize]) -> tuple[list[ModelSize], list[ModelSize]]:
    """What an evaluation of teachers holds at a time, at most, and one of the student."""
    largest = max((size for field, size in sizes.items() if field != "student.model"), key=lambda size: size.parameters)
    return [largest], [sizes["student.model"], largest]


def _trained(spec: DistillationSpec, size: ModelSize) -> int:
    """Weights of the student that are trained; adapters: two matrices a linear layer, seven layers a block."""
    lora = spec.student.lora
    return size.parameters if lora is None else 14 * lora.rank * size.hidden * size.layers


def _disk(spec: DistillationSpec, sizes: Mapping[str, ModelSize], rows: int | None, counted: int | None) -> dict[str, int]:
    """By what it is for. counted: tokens of all rows, where they are known."""
    tokens = (rows or 0) * spec.data.max_length if counted is None else counted
    student = sizes["student.model"]
    weights = student.parameters * stored_dtype(spec.student.model).itemsize
    cross = sum(t.cross_tokenizer for t in spec.teachers)
    kept = 0 if spec.training.save_steps is None else 2  # the one being written, and the one before
    return {
        "rows": row_bytes(tokens, cross),
        "scores": sum(
            tokens * score_bytes(t.scores.top_k, spec.training.precision) for t in spec.teachers if t.scores is not None
        ),
        "projections": sum(student.rows * t.projection.top_k * 8 for t in spec.teachers if t.projection is not None),
        "checkpoints": kept * student.checkpoint_bytes(_trained(spec, student)),
        "student": 2 * weights,
    }


def step_shape(spec: DistillationSpec, sizes: Mapping[str, ModelSize]) -> StepShape:
    """What of a spec the time of a step depends on."""
    training, gpus = spec.training, _gpus(spec)
    return StepShape(
        rows=training.global_batch_size / gpus,
        length=spec.data.max_length,
        micro_batch=training.micro_batch_size,
        compiled=training.compile,
        recomputed=training.activation_checkpointing,
        trained=None if spec.student.lora is None else _trained(spec, sizes["student.model"]),
        fp8=tuple(teacher.precision == "fp8" for teacher in spec.teachers if teacher.scores is None),
        gpus=gpus,
    )


def _gpus(spec: DistillationSpec) -> int:
    return spec.resources.nodes * max(spec.resources.gpus_per_node, 1)


def _hours(
    spec: DistillationSpec, sizes: Mapping[str, ModelSize], steps: int | None, finished: Run | None
) -> tuple[float | None, str]:
    """GPU hours of the training, and where they come from: the model of a step's time, or a finished run's operations a second."""
    if finished is None or finished.summary is None:
        seconds = step_seconds(sizes["student.model"], list(_running(spec, sizes).values()), step_shape(spec, sizes)).total
        hours = None if steps is None else steps * seconds * _gpus(spec) / 3600
        return hours, f"modelled: H100s, {seconds:.3g} s a step"
    theirs, summary = finished.as_spec(), finished.summary
    measured = sum(summary.seconds_by_phase.get(phase, 0.0) for phase in ("data", "teachers", "student"))
    if measured <= 0:
        raise InputError(f"{finished.name}: the run has no seconds by phase to take a speed from")
    speed = training_flops(theirs, model_sizes(theirs), summary.tokens) / measured / summary.ranks
    device = summary.environment.devices[0] if summary.environment and summary.environment.devices else "its devices"
    told = f"measured: {speed / 1e12:.3g} TFLOP/s on {device} in the run {finished.name}"
    if steps is None:
        return None, told
    tokens = steps * spec.training.global_batch_size * spec.data.max_length
    return training_flops(spec, sizes, tokens) / speed / 3600, told
