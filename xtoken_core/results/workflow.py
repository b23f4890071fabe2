"""The workflow itself: what was read, its tasks, and the run of Kubeflow Pipelines."""

from __future__ import annotations

from typing import Literal

from xtoken_core.results.record import Record


class ReadInput(Record):
    """A model or corpus that was read."""

    field: str
    """Of the spec."""
    uri: str
    version: str
    """Commit of a hub id, else fingerprint."""
    licence: str | None = None
    """Of a model, as its card says."""


class StepTimes(Record):
    """When a step ran."""

    started: float | None = None
    """Unix time."""
    seconds: float | None = None


class Prepared(Record):
    """Where what a run has prepared lies, for others that train on it."""

    rows: list[str] = []
    """One path or URI per shard."""
    projections: str | None = None
    """Of the folder of every W."""


class PipelineRun(Record):
    """The run of Kubeflow Pipelines that a run was made by."""

    id: str
    namespace: str | None = None
    url: str | None = None
    """Of its page."""


class Task(Record):
    """A task of the workflow; of one from the cache, when it ran and how long it took then."""

    name: str
    after: list[str] = []
    start: float | None = None
    """Unix time."""
    seconds: float | None = None
    status: Literal["done", "cached"] = "done"
