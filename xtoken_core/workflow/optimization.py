"""A sweep as an OptimizationJob of Kubeflow Trainer: each trial is a TrainJob, judged by what its progress tells.

The kind is that of Trainer's main branch (KEP-3562), which no release has yet. Its controller gives a trial its values as variables
`KUBEFLOW_TRAINER_OPT_<NAME>`, and reads the objective from `status.trainerStatus.metrics` of the trial's TrainJob.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from xtoken_core.errors import InputError
from xtoken_core.identity import identity
from xtoken_core.report.run import Run
from xtoken_core.spec import DistillationSpec
from xtoken_core.storage import is_remote, normalize
from xtoken_core.workflow.resolve import checkpoints_place
from xtoken_core.workflow.trainjob_manifest import GROUP, VERSION, Reads, about, manifest, parameter_name, trial_command
from xtoken_core.workflow.views import view

OBJECTIVE = "eval_validation_bits_per_byte"
"""What transformers' callback tells the TrainJob of our validation."""
MADE_BEFORE = ("prepare", "projections")
"""Steps whose results the trials take from a finished run."""


def optimization_job(spec: DistillationSpec, values: Mapping[str, Sequence[object]], finished: Run) -> dict[str, Any]:
    """The OptimizationJob that tries every combination of `values` (by dotted field of the spec) on the rows and W of a `finished` run.

    Every trial writes its student under `output.uri`, in a folder named by its values. Raises InputError.
    """
    rows, projections = _prepared(spec, finished)
    modes = dict(finished.summary.modes) if finished.summary else {}
    out = f"{normalize(spec.output.uri).rstrip('/')}/trials"
    reads = Reads(rows, modes, projections, checkpoints=checkpoints_place(spec))
    command = trial_command(reads, out, list(values))
    text = view(spec, "distill").to_json()
    job = manifest("of-a-trial", text, spec.resources, command)
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "OptimizationJob",
        "metadata": {"name": f"xtoken-sweep-{identity(text, command, length=12)}", "labels": job["metadata"]["labels"]},
        "spec": {
            "objectives": [{"metric": OBJECTIVE, "direction": "Minimize"}],
            "searchAlgorithm": {"grid": {}},
            "parameters": [_parameter(field, choices) for field, choices in values.items()],
            "numTrials": math.prod(len(choices) for choices in values.values()),
            "parallelTrials": 1,
            "trainJobTemplate": {
                "metadata": about(job["metadata"]["labels"], spec.resources.annotations),
                "spec": job["spec"],
            },
        },
    }


def _parameter(field: str, choices: Sequence[object]) -> dict[str, Any]:
    for choice in choices:
        if not isinstance(choice, (str, int, float, bool)) or not 0 < len(_text(choice)) <= 64 or "/" in _text(choice):
            raise InputError(f"--over: {field}: {choice}: a trial takes plain values of at most 64 characters, without a slash")
    return {"name": parameter_name(field), "searchSpace": {"categorical": {"choices": [_text(choice) for choice in choices]}}}


def _text(choice: object) -> str:
    """As `--set` takes it."""
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _prepared(spec: DistillationSpec, finished: Run) -> tuple[list[str], str | None]:
    """URIs of the rows and of W that a finished run has left. Raises InputError where the trials cannot read them."""
    if not spec.data.validation:
        raise InputError("data.validation: missing; trials are compared by its bits per byte")
    if computed := [t.id for t in spec.teachers if t.computes_scores]:
        raise InputError(f"teachers.{computed[0]}.scores: trials read stored ones only; name them by scores.uri")
    before = finished.as_spec()
    for step in MADE_BEFORE:
        if view(spec, step) != view(before, step):
            raise InputError(f"--rows-of: {finished.name}: its {step} step read another spec, whose results do not fit")
    found = finished.prepared
    places = [*found.rows, *([found.projections] if found.projections else [])]
    if not found.rows:
        raise InputError(f"--rows-of: {finished.name}: does not tell where its rows lie; it is of an older version")
    for place in places:
        if not is_remote(place) and not spec.resources.keeps(place):
            raise InputError(
                f"--rows-of: {place}: not every host can reach it; use a pipeline root that is a URI or on a resources.pvc"
            )
    return found.rows, found.projections
