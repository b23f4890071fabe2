"""Sweeps: the same spec with some fields of its training at several values each, as one workflow that shares everything else."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xtoken_core.errors import InputError
from xtoken_core.report.run import Run
from xtoken_core.spec import DistillationSpec
from xtoken_core.spec.text import parse_text
from xtoken_core.workflow.optimization import optimization_job
from xtoken_core.workflow.shape import shape
from xtoken_core.workflow.views import view

SHARED = ("overlap", "projections", "prepare", "score", "evaluate_teachers")
"""Steps that a sweep has once."""

MOST = 64
"""Variants of a sweep, whose tasks one workflow has to hold."""


def variants(path: Path, overrides: Sequence[str], over: Sequence[str]) -> dict[str, DistillationSpec]:
    """The specs of a sweep by label, every combination of the values; `over` holds `dotted.key=value,value,...`.

    Each publishes under its label at the spec's `output.uri`. Raises InputError for a field whose values would change more than training.
    """
    axes = [_axis(text) for text in over]
    if DistillationSpec.from_yaml(path, overrides).pilot is not None:
        raise InputError("pilot: a sweep has none; its candidates are the sweep's values")
    found: dict[str, DistillationSpec] = {}
    for values in itertools.product(*(values for _, values in axes)):
        changes = [f"{key}={json.dumps(value)}" for (key, _), value in zip(axes, values)]
        label = _label([key for key, _ in axes], values)
        spec = DistillationSpec.from_yaml(path, [*overrides, *changes])
        uri = spec.output.under(label)
        if label in found:
            raise InputError(f"--over: {label}: stands for two of its combinations")
        found[label] = DistillationSpec.from_yaml(path, [*overrides, *changes, f"output.uri={uri}"])
    if len(found) < 2 or len(found) > MOST:
        raise InputError(f"--over: {len(found)} combinations; a sweep has 2 to {MOST}")
    check_shared(found, [key for key, _ in axes])
    return found


def optimization(path: Path, overrides: Sequence[str], over: Sequence[str], rows_of: str) -> dict[str, Any]:
    """The same sweep as an OptimizationJob of Kubeflow Trainer, on the rows and W of the finished run at `rows_of`. Raises InputError."""
    variants(path, overrides, over)  # refuses what a sweep refuses
    return optimization_job(DistillationSpec.from_yaml(path, overrides), dict(map(_axis, over)), Run.published(rows_of))


def check_shared(specs: Mapping[str, DistillationSpec], keys: Sequence[str]) -> None:
    """Raises InputError where the variants do not share all but training."""
    first, *others = specs.values()
    fields = ", ".join(keys)
    for other in others:
        if shape(other) != shape(first):
            raise InputError(f"--over: {fields}: changes the tasks of the workflow, which the runs of a sweep share")
        for step in SHARED:
            if (step != "score" or computes_scores(first)) and view(other, step) != view(first, step):
                raise InputError(f"--over: {fields}: changes what the {step} step reads, which the runs of a sweep share")


def computes_scores(spec: DistillationSpec) -> bool:
    """Whether a run has score steps."""
    return any(teacher.computes_scores for teacher in spec.teachers)


def _axis(text: str) -> tuple[str, list[object]]:
    key, equals, values = text.partition("=")
    if not equals or not key or not values.strip():
        raise InputError(f"--over: {text}: KEY=VALUE,VALUE,... is wanted")
    found: list[object] = parse_text(f"[{values}]", f"--over: {key}")
    return key, found


def _label(keys: Sequence[str], values: Sequence[object]) -> str:
    """A name for tasks and folders, as kd-weight-0-5."""
    parts = [f"{key.rpartition('.')[2]}-{json.dumps(value)}" for key, value in zip(keys, values)]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
