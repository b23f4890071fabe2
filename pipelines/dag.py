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
from pipelines.cluster import on_cluster
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.resolve import shape
from xtoken_core.workflow.subjects import evaluated

NEVER_CACHED = ("resolve", "distill", "distill-baseline", "report")
"""Tasks whose results a cluster does not take from its cache: the first one looks at files, the last one publishes, and
training depends on more than its inputs (GPUs, mutable images). A local run has only itself, and reuses training too."""

AGREEMENT = ("student_before", "student_after_best")
"""Whose agreement with the teachers is measured: it costs a pass of every teacher, and these two tell what distillation changed."""


def build_pipeline(compiled: DistillationSpec) -> Any:
    """The pipeline of a spec. Its parameters, `spec` (JSON; this one by default) and `overrides`, are checked by its first task."""

    @dsl.pipeline(name=compiled.name, description=_description(compiled))
    def pipeline(spec: str = compiled.to_json(), overrides: str = ""):
        _add_tasks(compiled, spec, overrides)

    return pipeline


def _add_tasks(compiled: DistillationSpec, spec: Any, overrides: Any) -> None:
    edges: list[dict[str, Any]] = []
    add, gpus = _adder(compiled, edges), compiled.resources.gpus_per_node
    views = add(resolve, "resolve", spec=spec, overrides=overrides, compiled=json.dumps(shape(compiled)))
    audit = add(overlap, "overlap", spec=views["overlap"])

    matrices = {}
    for index, teacher in enumerate(compiled.teachers):
        if teacher.cross_tokenizer:
            task = add(projection, f"projection-{teacher.id}", after="overlap", heavy=True, spec=views[f"projection_{index}"])
            matrices[f"projection_{index}"] = task["matrix"]
    shares = range(compiled.data.shards)
    names = ["prepare"] if compiled.data.shards == 1 else [f"prepare-{shard}" for shard in shares]
    prepared = [
        add(prepare, name, after="overlap", heavy=True, spec=views["prepare"], shard=shard) for name, shard in zip(names, shares)
    ]
    rows, uris = prepared[0]["rows"], [share["uri"] for share in prepared]

    if compiled.resources.nodes > 1:  # the GPUs are those of the job's hosts, not of the task that follows it
        training = {"component": launch, "rows": uris, "resources": compiled.resources.model_dump_json()}
    else:
        training = {"component": distill, "gpus": gpus, "rows": rows} | ({"more_rows": uris[1:]} if uris[1:] else {})
    training["checkpoints"] = views["checkpoints"]
    student = add(name="distill", spec=views["distill"], modes=audit["modes"], **training, **matrices)["run"]
    runs = {"student_after": student}
    if compiled.evaluation.ce_baseline:
        runs["baseline"] = add(name="distill-baseline", spec=views["baseline"], baseline=True, **training)["run"]

    results = {}
    for who in evaluated(compiled):
        if who.startswith("teacher-"):
            index = [f"teacher-{teacher.id}" for teacher in compiled.teachers].index(who)
            slot, given = f"teacher_{index}", {"spec": views[f"evaluate_teacher_{index}"], "after": "overlap"}
        else:
            slot, given = who, {"spec": views["evaluate_student"]}
            if who in AGREEMENT:
                given |= {"rows": rows, "modes": audit["modes"], **matrices}
            given |= {"run": run for prefix, run in runs.items() if who.startswith(prefix)}  # noqa: B035 - of one prefix
        results[slot] = add(evaluate, f"evaluate-{who.replace('_', '-')}", gpus=min(gpus, 1), who=who, **given)["result"]

    kept = {"run": student} | ({"baseline": runs["baseline"]} if "baseline" in runs else {})
    add(
        report,
        "report",
        spec=views["report"],
        tasks=edges,
        inputs=views["inputs"],
        resolved=views["times"],
        overlap=audit["report"],
        rows=rows,
        **({"shards": uris[1:]} if uris[1:] else {}),
        **kept,
        **matrices,
        **results,
    )


def _adder(compiled: DistillationSpec, edges: list[dict[str, Any]]) -> Callable[..., Any]:
    """Returns a function that adds a task under its own name, set up for the cluster, and notes its edges in `edges`."""
    tasks: dict[str, dsl.PipelineTask] = {}

    def add(component: Any, name: str, *, after: str = "", heavy: bool = False, gpus: int | None = None, **inputs: Any) -> Any:
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
        on_cluster(task, compiled.resources, heavy=heavy, gpus=gpus, retried="distill" in tasks)
        return task.outputs

    return add


def _description(spec: DistillationSpec) -> str:
    teachers = ", ".join(teacher.model for teacher in spec.teachers)
    return f"Distills {teachers} into {spec.student.model}."
