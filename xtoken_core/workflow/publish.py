"""The end of a run: its report, and everything worth keeping published at its output."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from xtoken_core import storage
from xtoken_core.checksums import check_whole
from xtoken_core.data.statistics import all_shards, statistics_of
from xtoken_core.errors import blamed
from xtoken_core.report.card import model_card
from xtoken_core.report.page import write_report
from xtoken_core.report.run import Run
from xtoken_core.results.pilot import Pilot
from xtoken_core.results.training import TrainingSummary
from xtoken_core.results.vocabulary import OverlapReport
from xtoken_core.results.workflow import PipelineRun, Prepared, ReadInput, StepTimes, Task
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.evaluations import read_evaluations
from xtoken_core.workflow.serving import inference_service, vllm_line
from xtoken_core.workflow.subjects import Group
from xtoken_core.workflow.vocabularies import projection_stats


class Artifact(Protocol):
    """What a step wrote: a path, where it lies for others, and metadata with `started` and `seconds` of the step (see `workflow.step`)."""

    path: str
    uri: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """What the steps of a run have left."""

    overlap: Artifact
    rows: Artifact
    """Of the first shard."""
    run: Artifact | None
    """What training wrote; None where a pilot is all there is."""
    baseline: Artifact | None = None
    projections: Artifact | None = None
    pilot: Artifact | None = None
    evaluations: Mapping[Group, Artifact] = field(default_factory=dict)
    shards: Sequence[str] = ()
    """Where the other shards of the rows lie, whose statistics are read there."""
    tasks: Sequence[Task] = ()
    """Every task of the workflow, with its times where no artifact here tells them."""
    inputs: Sequence[ReadInput] = ()
    resolved: StepTimes = StepTimes()
    """Of the run's first step, which no cache ever holds: what started before it was taken from the cache."""
    pipeline_run: PipelineRun | None = None

    def times(self) -> dict[str, StepTimes]:
        """When each task ran, as far as its artifact tells."""
        artifacts = {
            "overlap": self.overlap,
            "projections": self.projections,
            "distill": self.run,
            "distill-baseline": self.baseline,
            "verdict": self.pilot,
            "prepare": self.rows,
            **{f"evaluate-{group}": artifact for group, artifact in self.evaluations.items()},
        }
        return {name: _step_times(artifact.metadata) for name, artifact in artifacts.items() if artifact} | {
            "resolve": self.resolved
        }


def finish(spec: DistillationSpec, parts: Parts, page: str | Path) -> Run:
    """Writes the report to `page` and publishes the run at `output.uri`; returns the run as the report saw it.

    Published: student/best and student/last (Hugging Face folders), report.html, run.json (what the report was made from),
    spec.yaml, logs/, projections/, serving/ (for KServe and vLLM), pilot.json; of a pilot that nothing follows no student.
    The checkpoints that it took go afterwards, since nothing can be lost any more.
    Raises InputError where publishing fails (no space, not allowed, not reachable), with nothing half-written, and RunError
    where what training wrote is damaged.
    """
    trainings = [artifact.path for artifact in (parts.run, parts.baseline) if artifact]
    for path in trainings:
        check_whole(path)
    counted = [statistics_of(f"{shard}/train") for shard in (parts.rows.path, *parts.shards)]
    held_out = [statistics_of(f"{parts.rows.path}/validation")] if spec.data.validation else []
    times = parts.times() | {f"prepare-{n}": StepTimes(started=c.started, seconds=c.seconds) for n, c in enumerate(counted)}
    run = Run.collect(
        spec,
        parts.run.path if parts.run else None,
        parts.baseline.path if parts.baseline else None,
        pilot=Pilot.read(parts.pilot.path) if parts.pilot else None,
        overlap=OverlapReport.read(parts.overlap.path),
        prepare={split: all_shards(c) for split, c in (("train", counted), ("validation", held_out)) if c},
        projections=projection_stats(spec, parts.projections.path) if parts.projections else {},
        results=[result for artifact in parts.evaluations.values() for result in read_evaluations(artifact.path)],
        inputs=list(parts.inputs),
        pipeline_run=parts.pipeline_run,
        prepared=Prepared(rows=[parts.rows.uri, *parts.shards], projections=parts.projections.uri if parts.projections else None),
        tasks=[_timed(task, times.get(task.name), parts.resolved) for task in parts.tasks],
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copyfile(write_report(run, folder), page)
        (folder / "spec.yaml").write_text(
            yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )
        if parts.run:
            _write_serving(spec, folder / "serving", storage.size(f"{parts.run.path}/{spec.checkpoint}"))
        for name, source in _kept(parts).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(source.absolute())
        for checkpoint in ("best", "last"):
            _with_card(folder / "student" / checkpoint, model_card(run, checkpoint))
        manifest = storage.Manifest.of_folder(folder, spec.name)
        (folder / storage.MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
        with blamed("output.uri"):
            place = (spec.output.uri, spec.name, spec.output.replace)
            storage.publish(folder, spec.output.uri, allowed=lambda: storage.check_place(*place))
    for path in trainings:
        if checkpoints := TrainingSummary.read(f"{path}/summary.json").checkpoints:
            storage.remove(checkpoints)
    return run


def _with_card(student: Path, card: str) -> None:
    """Puts a model card beside the files of a student, in place of the link to their folder."""
    if not student.is_symlink():
        return
    source = student.resolve()
    student.unlink()
    student.mkdir()
    for path in source.iterdir():
        (student / path.name).symlink_to(path)
    (student / "README.md").write_text(card, encoding="utf-8")


def _write_serving(spec: DistillationSpec, folder: Path, weights: int) -> None:
    """How the student is served: a line for vLLM, and KServe's resource where KServe can reach it."""
    folder.mkdir()
    student = spec.published_student
    (folder / "vllm.sh").write_text(f"{vllm_line(spec, student)}\n", encoding="utf-8")
    if service := inference_service(spec, student, weights):
        (folder / "inference-service.yaml").write_text(yaml.safe_dump(service, sort_keys=False), encoding="utf-8")


def _step_times(metadata: Mapping[str, Any]) -> StepTimes:
    return StepTimes(started=metadata.get("started"), seconds=metadata.get("seconds"))


def _timed(task: Task, told: StepTimes | None, resolved: StepTimes) -> Task:
    """The task with when it ran, and whether that was in this run; told: by an artifact."""
    times = told or StepTimes(started=task.start, seconds=task.seconds)
    cached = times.started is not None and resolved.started is not None and times.started < resolved.started
    done = {"start": times.started, "seconds": times.seconds, "status": "cached" if cached else "done"}
    return task.model_copy(update=done)


def _kept(parts: Parts) -> dict[str, Path]:
    """What is published, by its name there."""
    kept: dict[str, Path] = {}
    for artifact, name in ((parts.run, ""), (parts.baseline, "baseline-")):
        if artifact:
            run = Path(artifact.path)
            kept |= {f"logs/{name}{file}": run / file for file in ("log.jsonl", "summary.json", "tensorboard")}
    if parts.run:
        kept |= {f"student/{checkpoint}": Path(parts.run.path) / checkpoint for checkpoint in ("best", "last")}
    if parts.projections:
        kept["projections"] = Path(parts.projections.path)
    if parts.pilot:
        kept["pilot.json"] = Path(parts.pilot.path)
    return {name: path for name, path in kept.items() if path.exists()}
