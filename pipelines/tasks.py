"""The tasks of a workflow while it is compiled."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl
from kfp.dsl.pipeline_channel import PipelineChannel

from pipelines.cluster import Size, amounts_of, on_cluster
from xtoken_core.spec import DistillationSpec

NEVER_CACHED = ("resolve", "distill", "distill-baseline", "report", "compare")
"""Tasks whose results a cluster does not take from its cache: the first one looks at files, the last one publishes, and
training depends on more than its inputs (GPUs, mutable images). A local run has only itself, and reuses training too."""

RETRIED = ("score", "distill", "launch", "trial", "evaluate", "report", "compare")
"""Components whose tasks are tried again where they fail."""


class Tasks:
    """The tasks of a workflow, each under its own name and set up for the cluster; `edges` tells a report what waits for what."""

    def __init__(self, compiled: DistillationSpec):
        self._resources, self._label = compiled.resources, ""
        self._tasks: dict[str, dsl.PipelineTask] = {}
        self._resolved: Mapping[str, Any] = {}
        """Outputs of the first task, from when it is added."""
        self._plain: dict[str, str] = {}
        """Names as one run's report has them, by those of the workflow."""
        self.edges: list[dict[str, Any]] = []

    def of(self, label: str) -> Tasks:
        """The tasks so far, to which those of one variant of a sweep are added, under names that end in its label."""
        own = copy.copy(self)
        own._label, own.edges = label, list(self.edges)
        return own

    def add(
        self,
        component: Any,
        name: str,
        *,
        after: Sequence[str] = (),
        size: Size = Size.SMALL,
        gpus: int | None = None,
        **inputs: Any,
    ) -> Any:
        """Adds a task, which also waits for those of `after`; returns its outputs."""
        given = [item for value in inputs.values() for item in (value if isinstance(value, list) else [value])]
        upstream = {*after, *(item.task_name for item in given if isinstance(item, PipelineChannel) and item.task_name)}
        waited = dict.fromkeys(self._plain[task] for task in self._tasks if task in upstream)
        if name not in [edge["name"] for edge in self.edges]:
            told = [task for task in waited if task != "resolve"]
            self.edges.append({"name": name, "after": told or ["resolve"] if self.edges else []})
        full = f"{name}-{self._label}" if self._label else name
        named = copy.deepcopy(component)
        named.component_spec.name = full  # KFP would number the tasks of one component: evaluate, evaluate-2
        task = self._tasks[full] = named(**inputs)
        self._plain[full] = name
        task.after(*(self._tasks[other] for other in after))
        if name in NEVER_CACHED:
            task.set_caching_options(False)
        # KFP tries again whatever the reason: before training that is mostly bad input, which stays bad (and what was done
        # waits in the cache for another run); from training on, pre-emption.
        amounts = amounts_of(self._resources, size, self._resolved)
        on_cluster(task, self._resources, amounts, gpus, retried=component.python_func.__name__ in RETRIED)
        self._tell_times(name, task)
        if name == "resolve":
            self._resolved = task.outputs
        return task.outputs

    def _tell_times(self, name: str, task: dsl.PipelineTask) -> None:
        """Has the report told when a task ran that says so itself: one none of whose artifacts, which say so too, the report reads."""
        edge = next(edge for edge in self.edges if edge["name"] == name)
        if "started" in task.outputs:
            edge |= {"start": task.outputs["started"], "seconds": task.outputs["seconds"]}
