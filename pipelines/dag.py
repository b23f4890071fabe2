"""A spec as a Kubeflow pipeline: its tasks, one by one, unrolled over the teachers when it is compiled."""

import copy
import json
from collections.abc import Callable
from typing import Any

from kfp import dsl
from kfp.dsl.pipeline_channel import PipelineChannel

from components.distill import distill
from components.evaluate import evaluate
from components.launch import launch
from components.overlap import overlap
from components.prepare import prepare
from components.projection import projection
from components.report import report
from components.resolve import resolve
from components.score import score
from pipelines.cluster import Size, on_cluster
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.resolve import shape
from xtoken_core.workflow.subjects import Group, groups

NEVER_CACHED = ("resolve", "distill", "distill-baseline", "report")
"""Tasks whose results a cluster does not take from its cache: the first one looks at files, the last one publishes, and
training depends on more than its inputs (GPUs, mutable images). A local run has only itself, and reuses training too."""

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
        _add_tasks(compiled, spec, overrides)

    pipeline.__doc__ = PARAMETERS
    kept = dsl.PipelineConfig(ttl_seconds_after_finished=compiled.resources.ttl_seconds_after_finished)
    return dsl.pipeline(pipeline, name=compiled.name, description=_description(compiled), pipeline_config=kept)


def _add_tasks(compiled: DistillationSpec, spec: Any, overrides: Any) -> None:
    edges: list[dict[str, Any]] = []
    add = _adder(compiled, edges)
    views = add(resolve, "resolve", spec=spec, overrides=overrides, compiled=json.dumps(shape(compiled)))
    audit = add(overlap, "overlap", spec=views["overlap"])

    matrices = {}
    if any(teacher.cross_tokenizer for teacher in compiled.teachers):
        built = add(projection, "projections", after="overlap", spec=views["projections"])
        matrices = {"projections": built["matrices"]}
    shares = range(compiled.data.shards)
    names = ["prepare"] if compiled.data.shards == 1 else [f"prepare-{shard}" for shard in shares]
    prepared = [
        add(prepare, name, after="overlap", size=Size.HEAVY, spec=views["prepare"], shard=shard)
        for name, shard in zip(names, shares)
    ]
    rows, uris = prepared[0]["rows"], [share["uri"] for share in prepared]

    teaching = {"modes": audit["modes"], **matrices, **_scores(compiled, add, views, prepared)}
    runs = _trainings(compiled, add, views, rows, uris, teaching)
    agreement = {"rows": rows, "modes": audit["modes"], **matrices}
    given: dict[Group, dict[str, Any]] = {
        Group.TEACHERS: {"spec": views["evaluate_teachers"], "after": "overlap"},
        Group.BEFORE: {"spec": views["evaluate_student"], **agreement},
        Group.AFTER: {"spec": views["evaluate_student"], "run": runs["run"], **agreement},
        Group.BASELINE: {"spec": views["evaluate_student"], "run": runs.get("baseline")},
    }
    gpus = min(compiled.resources.gpus_per_node, 1)
    results = {
        REPORT_INPUTS[group]: add(
            evaluate, f"evaluate-{group}", size=Size.EVALUATION, gpus=gpus, group=str(group), **given[group]
        )["results"]
        for group in groups(compiled)
    }
    told = {"tasks": edges, "inputs": views["inputs"], "resolved": views["times"], **({"shards": uris[1:]} if uris[1:] else {})}
    add(report, "report", spec=views["report"], overlap=audit["report"], rows=rows, **told, **runs, **matrices, **results)


def _scores(compiled: DistillationSpec, add: Callable[..., Any], views: Any, prepared: list[Any]) -> dict[str, Any]:
    """Adds a task for each teacher whose scores are computed, and each shard of rows; distill's input, if there are any."""
    gpus = min(compiled.resources.gpus_per_node, 1)
    uris = []
    for teacher in compiled.teachers:
        if teacher.scores is None or teacher.scores.uri is not None:
            continue
        for shard, share in enumerate(prepared):
            name = f"score-{teacher.id}" if len(prepared) == 1 else f"score-{teacher.id}-{shard}"
            uris.append(
                add(score, name, size=Size.EVALUATION, gpus=gpus, spec=views["score"], teacher=teacher.id, rows=share["rows"])[
                    "uri"
                ]
            )
    return {"scores": uris} if uris else {}


def _trainings(
    compiled: DistillationSpec, add: Callable[..., Any], views: Any, rows: Any, uris: list[Any], teaching: dict[str, Any]
) -> dict[str, Any]:
    """Adds the training, and that of the twin where the spec wants one; what they write, by the report's input."""
    if compiled.resources.nodes > 1:  # the GPUs are those of the job's hosts, not of the task that follows it
        given = {"component": launch, "rows": uris, "resources": compiled.resources.model_dump_json()}
    else:
        given = {"component": distill, "size": Size.HEAVY, "gpus": compiled.resources.gpus_per_node, "rows": rows}
        given |= {"more_rows": uris[1:]} if uris[1:] else {}
    given["checkpoints"] = views["checkpoints"]
    runs = {"run": add(name="distill", spec=views["distill"], **given, **teaching)["run"]}
    if compiled.evaluation.ce_baseline:
        runs["baseline"] = add(name="distill-baseline", spec=views["baseline"], baseline=True, **given)["run"]
    return runs


def _adder(compiled: DistillationSpec, edges: list[dict[str, Any]]) -> Callable[..., Any]:
    """Returns a function that adds a task under its own name, set up for the cluster, and notes its edges in `edges`."""
    tasks: dict[str, dsl.PipelineTask] = {}

    def add(
        component: Any, name: str, *, after: str = "", size: Size = Size.SMALL, gpus: int | None = None, **inputs: Any
    ) -> Any:
        upstream = [after] if after else []
        given = [item for value in inputs.values() for item in (value if isinstance(value, list) else [value])]
        upstream += [item.task_name for item in given if isinstance(item, PipelineChannel) and item.task_name]
        edges.append(
            {"name": name, "after": [task for task in tasks if task in upstream and task != "resolve"] or list(tasks)[:1]}
        )
        named = copy.deepcopy(component)
        named.component_spec.name = name  # KFP would number the tasks of one component: projection, projection-2
        task = tasks[name] = named(**inputs)
        if after:
            task.after(tasks[after])
        if name in NEVER_CACHED:
            task.set_caching_options(False)
        # KFP tries again whatever the reason: before training that is mostly bad input, which stays bad (and what was done
        # waits in the cache for another run); from training on, pre-emption.
        on_cluster(task, compiled.resources, size, gpus, retried="distill" in tasks)
        return task.outputs

    return add


def _description(spec: DistillationSpec) -> str:
    teachers = ", ".join(teacher.model for teacher in spec.teachers)
    return f"Distills {teachers} into {spec.student.model}."
