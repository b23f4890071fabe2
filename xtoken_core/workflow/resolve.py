"""The first step: checks the spec, and gives every other step its own view of it.

A view holds what the step reads of the spec, and a digest of the files that it reads and of this library's code. A workflow engine
that keys its cache on a step's inputs then runs a step again exactly when something that it depends on has changed.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable
from typing import NamedTuple

from xtoken_core import storage
from xtoken_core.costs import GIB
from xtoken_core.data.documents import check_corpora
from xtoken_core.errors import InputError, blamed
from xtoken_core.results.plan import Plan
from xtoken_core.results.workflow import ReadInput
from xtoken_core.spec import DistillationSpec, StudentSpec, TeacherSpec
from xtoken_core.training.trackers import check_trackers
from xtoken_core.workflow.model_checks import check_models, shared_rows
from xtoken_core.workflow.plan import plan
from xtoken_core.workflow.registry import check_registry
from xtoken_core.workflow.shape import CHECKPOINTS, check_ranks, check_shape, output_lasts, shape
from xtoken_core.workflow.versions import Versions, stored_matrices, stored_scores
from xtoken_core.workflow.views import View, view


class Resolved(NamedTuple):
    """What the steps of a run are given: to each kind of step its `View` as JSON, and what resolving has found."""

    overlap: str
    projections: str
    prepare: str
    score: str
    distill: str
    baseline: str
    trial: str
    evaluate_student: str
    evaluate_teachers: str
    report: str
    checkpoints: str
    """Folder or URI for the checkpoints of this run."""
    teacher_memory: str
    """What a step that evaluates teachers, or computes their scores, asks a cluster for, as Kubernetes writes it."""
    student_memory: str
    """So for a step that evaluates the student."""
    inputs: list[ReadInput]
    """Every model and corpus."""
    plan: Plan
    """What the run will take."""


def resolve(spec_text: str, overrides: str = "", compiled: str = "") -> Resolved:
    """Checks a spec with its overrides, and returns the view of every step.

    `overrides` holds `dotted.key=value` items separated by blanks, quoted as in a shell. `compiled`, where given, is the
    `shape` of the spec that was compiled, as JSON.

    Raises InputError for a bad spec or override, for an override that the compiled pipeline cannot follow, for rows that do
    not divide over a cluster's GPUs, for models and data that are not there or of no known kind, and for an output that cannot be written or would
    take the place of something that is no run.
    """
    spec = DistillationSpec.from_text(spec_text, _split(overrides))
    check_shape(spec, json.loads(compiled) if compiled else shape(spec))
    if CHECKPOINTS not in os.environ:  # a local run has this machine's GPUs, whatever `resources` says
        check_ranks(spec)
    check_output(spec)
    check_trackers(spec.training.report_to)
    check_registry(spec)
    if spec.evaluation.tasks:
        from xtoken_core.evaluation.harness import plan_tasks

        plan_tasks(spec.evaluation.tasks)  # a misspelt task shows now, and not after the training
    versions = Versions()
    views = _views(spec, versions)
    chats = check_corpora(spec)
    planned = _checked_plan(spec, chats)  # last: what is not there at all has been told by then
    if any(not teacher.cross_tokenizer for teacher in _scored(spec)):
        views["score"] = views["score"].model_copy(update={"shared_rows": shared_rows(spec)})
    return Resolved(
        **{step: seen.to_json() for step, seen in views.items()},
        report=spec.to_json(),
        checkpoints=checkpoints_place(spec),
        teacher_memory=_evaluation_memory(spec, planned.host_memory["teacher"]),
        student_memory=_evaluation_memory(spec, planned.host_memory["student"]),
        inputs=versions.known,
        plan=planned,
    )


def _views(spec: DistillationSpec, versions: Versions) -> dict[str, View]:
    """What each kind of step reads, by its name; `versions` get to know all of it. Raises InputError for what is not there."""
    models: tuple[StudentSpec | TeacherSpec, ...] = (spec.student, *spec.teachers)
    train, held_out = _named("data.train", spec.data.train_uris), _named("data.validation", spec.data.validation)
    folders = _named("evaluation.tasks", [task for task in spec.evaluation.tasks if "/" in task])
    texts = [*(_named("evaluation.texts", spec.evaluation.texts) or held_out), *folders]
    scores = stored_scores(spec.teachers)
    return {
        "overlap": view(spec, "overlap", versions.of(tokenizers=models)),
        "projections": view(spec, "projections", versions.of(texts=stored_matrices(models), tokenizers=models)),
        "prepare": view(spec, "prepare", versions.of(texts=[*train, *held_out], tokenizers=models)),
        "score": view(spec, "score", versions.of(_scored(spec), tokenizers=[spec.student])),
        "distill": view(spec, "distill", versions.of(models, scores)),
        "baseline": view(spec, "baseline", versions.of([spec.student])),
        "trial": view(spec, "trial", versions.of(models, [*texts, *scores])),
        "evaluate_student": view(spec, "evaluate_student", versions.of(models, texts)),
        "evaluate_teachers": view(spec, "evaluate_teachers", versions.of(spec.teachers, texts)),
    }


def _scored(spec: DistillationSpec) -> list[TeacherSpec]:
    """The teachers whose scores the run computes."""
    return [teacher for teacher in spec.teachers if teacher.computes_scores]


def _checked_plan(spec: DistillationSpec, chats: list[str]) -> Plan:
    """The plan of a run whose models fit the spec and its texts, of which some fields hold chats. Raises InputError where they do not."""
    check_models(spec, chats)
    return plan(spec)


def _evaluation_memory(spec: DistillationSpec, planned: int) -> str:
    """`resources.evaluation_memory`, else what is planned, in whole GiB."""
    return spec.resources.evaluation_memory or f"{math.ceil(planned / GIB)}Gi"


def check_output(spec: DistillationSpec) -> None:
    """Raises InputError unless the run can be published: by what lies at its output, by rights, and by room on a local disk."""
    output, student = spec.output, spec.student
    with blamed("output.uri"):
        storage.check_place(output.uri, spec.name, output.replace)
    place = storage.normalize(student.model)
    if student.keep_layers is None and (storage.is_remote(place) or os.path.isfile(place) or os.path.isdir(place)):
        with blamed("output.uri"):
            storage.check_space(output.uri, student.model)


def _split(overrides: str) -> list[str]:
    try:
        return shlex.split(overrides)
    except ValueError as e:
        raise InputError(f"overrides: {e}") from None


def checkpoints_place(spec: DistillationSpec) -> str:
    """Beside an output that outlives its pod; local runs name a folder that does not depend on the output."""
    default = f"{spec.output.uri.rstrip('/')}.checkpoints" if output_lasts(spec) else ""
    return os.environ.get(CHECKPOINTS, default)


def _named(field: str, uris: Iterable[str]) -> list[tuple[str, str]]:
    return [(field, uri) for uri in uris]
