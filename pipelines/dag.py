"""A spec as a Kubeflow pipeline: its tasks, one by one, unrolled over the teachers when it is compiled."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kfp import dsl

from components.audit import audit
from components.compare import compare
from components.distill import distill
from components.evaluate import evaluate
from components.launch import launch
from components.overlap import overlap
from components.prepare import prepare
from components.projection import projection
from components.report import report
from components.resolve import resolve
from components.score import score
from components.standing import standing
from components.trial import trial
from components.verdict import verdict
from pipelines.cluster import Size
from pipelines.tasks import Tasks
from xtoken_core.spec import DistillationSpec
from xtoken_core.spec.pilot import CE
from xtoken_core.workflow.rungs import Rung, rungs
from xtoken_core.workflow.shape import shape
from xtoken_core.workflow.subjects import Group, groups
from xtoken_core.workflow.views import view

PARAMETERS = """Distills a student.

Args:
    spec: The whole spec, as JSON or YAML; by default the one that was compiled.
    overrides: Changes to it, as dotted.key=value items separated by blanks; the first task checks them.
"""

REPORT_INPUTS = {
    Group.TEACHERS: "evaluated_teachers",
    Group.BEFORE: "evaluated_before",
    Group.AFTER: "evaluated_after",
    Group.BASELINE: "evaluated_baseline",
}


def build_pipeline(compiled: DistillationSpec) -> Any:
    """The pipeline of a spec. Its parameters, `spec` (JSON; this one by default) and `overrides`, are checked by its first task."""

    def pipeline(spec: str = compiled.to_json(), overrides: str = ""):
        tasks = Tasks(compiled)
        views = _resolved(tasks, compiled, spec, overrides)
        shared = _shared(tasks, compiled, views)
        if compiled.pilot is not None and compiled.pilot.then == "stop":
            before = _evaluated(tasks, compiled, Group.BEFORE, views)
            pilot, _ = _piloted(tasks, compiled, views, shared, before)
            _reported(tasks, views, shared, before | pilot)
        else:
            before = _evaluated(tasks, compiled, Group.BEFORE, views, **shared.agreement)
            pilot, chosen = _piloted(tasks, compiled, views, shared, before)
            _trained(tasks, compiled, views, shared, before | pilot | _twin(tasks, compiled, views, shared), chosen)

    pipeline.__doc__ = PARAMETERS
    return _pipeline(pipeline, compiled, _description(compiled))


def build_sweep(variants: Mapping[str, DistillationSpec]) -> Any:
    """The pipeline of a sweep (see `pipelines.sweeps`): what all share once, then a training and a report of each, then their comparison.

    Its parameter `overrides` changes all of them.
    """
    first = next(iter(variants.values()))

    def pipeline(overrides: str = ""):
        tasks = Tasks(first)
        views = _resolved(tasks, first, first.to_json(), overrides)
        shared = _shared(tasks, first, views)
        common = _common(tasks, variants, views, shared)
        for label, spec in variants.items():
            own = tasks.of(label)
            own_views = _resolved(own, spec, spec.to_json(), overrides)
            results = dict(common)
            if "evaluated_before" not in results:
                results |= _evaluated(own, spec, Group.BEFORE, own_views, **shared.agreement)
            if "baseline" not in results:
                results |= _twin(own, spec, own_views, shared)
            _trained(own, spec, own_views, shared, results, {})
        last = [f"report-{label}" for label in variants]
        tasks.add(compare, "compare", after=last, runs=[spec.output.uri for spec in variants.values()])

    pipeline.__doc__ = PARAMETERS
    return _pipeline(pipeline, first, f"{_description(first)} {len(variants)} variants.")


def _pipeline(function: Callable[..., None], compiled: DistillationSpec, description: str) -> Any:
    kept = dsl.PipelineConfig(ttl_seconds_after_finished=compiled.resources.ttl_seconds_after_finished)
    return dsl.pipeline(function, name=compiled.name, description=description, pipeline_config=kept)


@dataclass(frozen=True)
class Shared:
    """What every training and evaluation of a workflow reads."""

    views: Any
    """Of the workflow's first task."""
    audit: Any
    rows: Any
    """Of the first shard."""
    uris: list[Any]
    """Of the rows of all shards."""
    matrices: dict[str, Any]
    """`projections`, where a teacher has one."""
    teachers: dict[str, Any]
    """The teachers' evaluation, where they are evaluated."""
    scores: dict[str, Any]
    """`scores`, where a teacher has some computed."""

    def others(self, name: str) -> dict[str, Any]:
        """The rows of the other shards as the input `name`, where there are any."""
        return {name: self.uris[1:]} if self.uris[1:] else {}

    @property
    def taught(self) -> dict[str, Any]:
        """What a training with teachers takes beside rows."""
        return {"modes": self.audit["modes"], **self.matrices, **self.scores}

    @property
    def agreement(self) -> dict[str, Any]:
        """What the agreement with the teachers takes."""
        return {"rows": self.rows, "modes": self.audit["modes"], **self.matrices}


def _resolved(tasks: Tasks, compiled: DistillationSpec, spec: Any, overrides: Any) -> Any:
    return tasks.add(resolve, "resolve", spec=spec, overrides=overrides, compiled=json.dumps(shape(compiled)))


def _shared(tasks: Tasks, compiled: DistillationSpec, views: Any) -> Shared:
    """Adds what needs no training."""
    audit = tasks.add(overlap, "overlap", spec=views["overlap"])
    shares = range(compiled.data.shards)
    names = ["prepare"] if compiled.data.shards == 1 else [f"prepare-{shard}" for shard in shares]
    prepared = [
        tasks.add(prepare, name, after=["overlap"], size=Size.HEAVY, spec=views["prepare"], shard=shard)
        for name, shard in zip(names, shares)
    ]
    uris, matrices = [share["uri"] for share in prepared], {}
    if any(teacher.cross_tokenizer for teacher in compiled.teachers):
        others: dict[str, Any] = {"more_rows": uris[1:]} if uris[1:] else {}
        built = tasks.add(projection, "projections", spec=views["projections"], rows=prepared[0]["rows"], **others)
        matrices = {"projections": built["matrices"]}
    teachers = _evaluated(tasks, compiled, Group.TEACHERS, views, after=["overlap"])
    scores = _scores(tasks, compiled, views, prepared, matrices)
    return Shared(views, audit, prepared[0]["rows"], uris, matrices, teachers, scores)


def _scores(
    tasks: Tasks, compiled: DistillationSpec, views: Any, prepared: list[Any], matrices: dict[str, Any]
) -> dict[str, Any]:
    """Adds a task for each teacher whose scores are computed, and each shard of rows; distill's input, if there are any."""
    gpus = min(compiled.resources.gpus_per_node, 1)
    uris = []
    for teacher in compiled.teachers:
        if teacher.scores is None or teacher.scores.uri is not None:
            continue
        for shard, share in enumerate(prepared):
            name = f"score-{teacher.id}" if len(prepared) == 1 else f"score-{teacher.id}-{shard}"
            given = {"spec": views["score"], "teacher": teacher.id, "rows": share["rows"]}
            given |= matrices if teacher.cross_tokenizer else {}
            uris.append(tasks.add(score, name, size=Size.TEACHER, gpus=gpus, **given)["uri"])
    return {"scores": uris} if uris else {}


def _common(tasks: Tasks, variants: Mapping[str, DistillationSpec], views: Any, shared: Shared) -> dict[str, Any]:
    """Adds what else the variants of a sweep have in common: the student before, and the twin, where nothing that differs concerns it."""
    first, *others = variants.values()

    def same(step: str) -> bool:
        return all(view(other, step) == view(first, step) for other in others)

    results: dict[str, Any] = {}
    if same("evaluate_student"):
        results |= _evaluated(tasks, first, Group.BEFORE, views, **shared.agreement)
        if same("baseline"):
            results |= _twin(tasks, first, views, shared)
    return results


def _evaluated(tasks: Tasks, compiled: DistillationSpec, group: Group, views: Any, **inputs: Any) -> dict[str, Any]:
    """Adds the evaluation of a group, if the spec has it; its results by the report's input."""
    if group not in groups(compiled):
        return {}
    size = Size.TEACHER if group is Group.TEACHERS else Size.STUDENT
    spec = views["evaluate_teachers" if group is Group.TEACHERS else "evaluate_student"]
    gpus = min(compiled.resources.gpus_per_node, 1)
    done = tasks.add(evaluate, f"evaluate-{group}", size=size, gpus=gpus, spec=spec, group=str(group), **inputs)
    return {REPORT_INPUTS[group]: done["results"]}


def _twin(tasks: Tasks, compiled: DistillationSpec, views: Any, shared: Shared) -> dict[str, Any]:
    """Adds the twin's training and evaluation, if the spec wants one; what they write, by the report's input."""
    if not compiled.evaluation.ce_baseline:
        return {}
    given = _training(compiled, views, shared)
    run = tasks.add(name="distill-baseline", spec=views["baseline"], baseline=True, **given)["run"]
    return {"baseline": run} | _evaluated(tasks, compiled, Group.BASELINE, views, run=run)


def _trained(
    tasks: Tasks, compiled: DistillationSpec, views: Any, shared: Shared, results: dict[str, Any], chosen: dict[str, Any]
) -> None:
    """Adds the training, its evaluation and the report.

    results: what else the report reads, by its inputs. chosen: the `candidate` of the training, where a pilot chooses one.
    """
    given = _training(compiled, views, shared)
    run = tasks.add(name="distill", spec=views["distill"], **given, **shared.taught, **chosen)["run"]
    after = _evaluated(tasks, compiled, Group.AFTER, views, run=run, **shared.agreement)
    _reported(tasks, views, shared, {"run": run, **after, **results})


def _reported(tasks: Tasks, views: Any, shared: Shared, results: dict[str, Any]) -> None:
    """Adds the report; `results`: what it reads beside what all trainings share."""
    told = {"tasks": tasks.edges, "inputs": views["inputs"], "resolved": shared.views["times"], **shared.others("shards")}
    told["pipeline_run"] = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    read = {"overlap": shared.audit["report"], "rows": shared.rows, **shared.matrices, **shared.teachers}
    tasks.add(report, "report", spec=views["report"], **told, **read, **results)


def _piloted(
    tasks: Tasks, compiled: DistillationSpec, views: Any, shared: Shared, before: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Adds the pilot, if the spec has one: the audit, rung after rung, the verdict; its inputs of the report, and of the training."""
    if compiled.pilot is None:
        return {}, {}
    evaluated = {"before": before["evaluated_before"], "teachers": shared.teachers["evaluated_teachers"]}
    audited = tasks.add(audit, "audit", **evaluated)["lines"]
    fields = [candidate.model_dump(mode="json", exclude_defaults=True) for candidate in compiled.pilot.candidates]
    results: list[Any] = []
    names: dict[str, Any] = {}
    ladder = rungs(compiled.pilot)
    for rung in ladder:
        done = [_tried(tasks, compiled, views, shared, rung, {"candidates": [{"name": CE}]})]
        for place in range(rung.candidates):  # on the first rung only its own candidate concerns a task, and the cache
            among = {"candidates": fields, "place": place, **names} if names else {"candidates": [fields[place]]}
            done.append(_tried(tasks, compiled, views, shared, rung, among | shared.taught))
        results += done
        if rung != ladder[-1]:
            names = {"standing": tasks.add(standing, f"standing-{rung.number}", results=done)["names"]}
    told = {"spec": views["report"], "results": results, "audited": audited, "rows": shared.rows, **shared.others("shards")}
    found = tasks.add(verdict, "verdict", **told)
    return {"pilot": found["pilot"]}, {"candidate": found["chosen"]}


def _tried(tasks: Tasks, compiled: DistillationSpec, views: Any, shared: Shared, rung: Rung, inputs: dict[str, Any]) -> Any:
    """Adds a short run; what it comes to. `inputs`: the candidate, or those among which the place is."""
    who = str(inputs["place"]) if "place" in inputs else inputs["candidates"][0]["name"]
    given = {
        "spec": views["trial"],
        "rows": shared.rows,
        "checkpoints": views["checkpoints"],
        **shared.others("more_rows"),
        **inputs,
    }
    return tasks.add(
        trial,
        f"trial-{rung.number}-{who}",
        after=["audit"],
        size=Size.HEAVY,
        gpus=compiled.resources.gpus_per_node,
        rung=rung.number,
        share=repr(rung.share),
        **given,
    )["result"]


def _training(compiled: DistillationSpec, views: Any, shared: Shared) -> dict[str, Any]:
    """The component that trains, with the inputs of student and twin alike."""
    checkpoints = {"checkpoints": views["checkpoints"]}
    if compiled.resources.nodes > 1:  # the GPUs are those of the job's hosts, not of the task that follows it
        resources = compiled.resources.model_dump_json()
        return {"component": launch, "rows": shared.uris, "resources": resources, **checkpoints}
    size = {"size": Size.HEAVY, "gpus": compiled.resources.gpus_per_node}
    return {"component": distill, "rows": shared.rows, **size, **shared.others("more_rows"), **checkpoints}


def _description(spec: DistillationSpec) -> str:
    teachers = ", ".join(teacher.model for teacher in spec.teachers)
    return f"Distills {teachers} into {spec.student.model}."
