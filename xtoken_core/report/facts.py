"""What was run, in pairs of words and values: the student, the machine, the versions; each teacher's vocabulary and W."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xtoken_core.report.charts import duration, number
from xtoken_core.report.run import Run
from xtoken_core.results.training import Environment, TrainingSummary

Fact = tuple[str, str]


def run_facts(run: Run) -> Iterator[Fact]:
    """Student, training, machine, versions, places."""
    yield "student", run.spec["student"]["model"]
    if run.overlap:
        yield "student's vocabulary", f"{run.overlap.student.size:,} ids, fingerprint {run.overlap.student.fingerprint}"
    if run.summary:
        yield from _training(run.summary)
    yield from _cost(run)
    if run.summary and run.summary.environment:
        yield from _machine(run.summary.environment)
    yield "published at", run.spec["output"]["uri"]
    if run.pipeline_run:
        yield "pipeline run", run.pipeline_run.url or run.pipeline_run.id
        if run.pipeline_run.namespace:
            yield "namespace", run.pipeline_run.namespace
    if run.created:
        yield "report made", run.made


def _training(summary: TrainingSummary) -> Iterator[Fact]:
    if summary.parameters:
        yield "parameters", f"{summary.parameters:,}"
    yield "trained", f"{summary.steps:,} steps, {number(summary.tokens)} student tokens"
    yield "training took", duration(summary.seconds)
    if summary.trainable_parameters and summary.parameters and summary.trainable_parameters < summary.parameters:
        yield "trained parameters", f"{summary.trainable_parameters:,}"
    if summary.precision:
        yield "precision", summary.precision
    if summary.resumed_from:
        yield "resumed", f"at step {summary.resumed_from:,}"


def _cost(run: Run) -> Iterator[Fact]:
    """GPU hours of training, and those of the twin; without GPUs, hours of the machine."""
    for name, summary in (("training cost", run.summary), ("the twin cost", run.baseline_summary)):
        if summary:
            gpus = bool(summary.environment and summary.environment.devices)
            hours = summary.seconds / 3600 * (summary.ranks if gpus else 1)
            yield name, f"{hours:.2f} {'GPU hours' if gpus else 'hours of this machine'}"


def _machine(environment: Environment) -> Iterator[Fact]:
    devices = environment.devices
    yield "accelerators", f"{len(devices)} x {devices[0]}" if devices else "none"
    yield "processor", f"{environment.cpu}, {environment.cpu_cores} cores, {environment.memory_gib} GiB"
    yield "system", f"{environment.platform}, Python {environment.python}"
    yield "libraries", ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    if environment.commit:
        yield "commit", environment.commit


def teacher_facts(run: Run, teacher: dict[str, Any]) -> Iterator[Fact]:
    """Of one teacher (its section of the spec): its loss mode, its vocabulary, its chunks, its projection."""
    name = teacher["id"]
    yield "model", teacher["model"]
    loss = run.spec["loss"]
    if len(run.teachers) > 1 and not loss["weight_metric"] and loss["aggregation"] != "select_teacher":
        yield "weight", f"{teacher['weight']:g}, fixed"
    if overlap := run.overlap and run.overlap.teachers.get(name):
        yield "loss mode", f"{overlap.mode}: {overlap.reason}"
        yield "vocabulary", f"{overlap.size:,} ids, fingerprint {overlap.fingerprint}"
        yield "shared with the student", f"{overlap.shared:,} byte strings, overlap {overlap.coefficient:.4f}"
    train = run.prepare.get("train")
    if (chunks := train and train.teachers.get(name)) and chunks.chunks:
        yield "chunks of training text", f"{chunks.chunks:,}, {_percent(chunks.exact_chunks, chunks.chunks)} exact"
    if w := run.projections.get(name):
        kinds = f"{_percent(w.exact, w.rows)} exact, {_percent(w.multi, w.rows)} of several tokens, {w.empty:,} empty"
        yield "rows of W", f"{w.rows:,}: {kinds}"
        if w.joined and overlap and overlap.mode == "partition_kl":
            cells = w.joined
            yield "cells", f"{cells.cells:,}, {cells.left:,} once joined by the training text"
            told = f"{100 * cells.apart_left:.2f} %, {100 * cells.apart:.2f} % before they were joined"
            yield "chunks whose first tokens lie in different cells", told
        if w.seconds is not None:
            yield "W was built in", duration(w.seconds)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"
