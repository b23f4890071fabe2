"""The end of a run: its report, and everything worth keeping published at its output."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from xtoken_core import storage
from xtoken_core.data.statistics import all_shards, statistics_of
from xtoken_core.errors import InputError
from xtoken_core.report.page import write_report
from xtoken_core.report.run import Run
from xtoken_core.spec import DistillationSpec


class Artifact(Protocol):
    """What a step wrote: a path, and metadata with `started` and `seconds` of the step (see `workflow.step`)."""

    path: str
    metadata: dict[str, Any]


def finish(
    spec: DistillationSpec,
    artifacts: Mapping[str, Artifact],
    tasks: Sequence[Mapping[str, Any]],
    inputs: Sequence[Mapping[str, str]],
    resolved: Mapping[str, float],
    page: str | Path,
    shards: Sequence[str] = (),
) -> Run:
    """Writes the report to `page` and publishes the run at `output.uri`; returns the run as the report saw it.

    `artifacts`: by the name of the task that wrote them: overlap, prepare, distill, distill-baseline, projection-<id>,
    evaluate-<who>. `tasks`: `{"name", "after"}` of every task of the workflow. `inputs`:
    `{"field", "uri", "version"}` of what was read. `resolved`: `started` and `seconds` of the run's first step, which no
    cache ever holds: what started before it was taken from the cache. `shards`: where the other shards of the rows lie, whose
    tasks and statistics are read there. Published: student/best and student/last
    (Hugging Face folders), report.html, run.json (what the report was made from), spec.yaml, logs/, projections/<id>/.
    Raises InputError where publishing fails (no space, not allowed, not reachable), with nothing half-written.
    """
    rows = _statistics(spec, [artifacts["prepare"].path, *shards])
    times = {name: artifact.metadata for name, artifact in artifacts.items()} | {"resolve": resolved}
    times |= {f"prepare-{shard}": counts for shard, counts in enumerate(rows["train"])}
    run = Run.collect(
        spec,
        overlap=artifacts["overlap"].path,
        prepare={split: all_shards(counts) for split, counts in rows.items()},
        projections={t.id: f"{a.path}/stats.json" for t in spec.teachers if (a := artifacts.get(f"projection-{t.id}"))},
        results=[a.path for name, a in artifacts.items() if name.startswith("evaluate-")],
        inputs=inputs,
        tasks=[_timed(task, times.get(task["name"], {}), resolved) for task in tasks],
        **_training("", artifacts["distill"]),
        **_training("baseline_", artifacts.get("distill-baseline")),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copyfile(write_report(run, folder), page)
        (folder / "spec.yaml").write_text(
            yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )
        for name, path in _kept(artifacts).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path.absolute())
        try:
            storage.check_replaceable(spec.output.uri)
            storage.publish(folder, spec.output.uri)
        except InputError as e:
            raise InputError(f"output.uri: {e}") from None
    return run


def _statistics(spec: DistillationSpec, shards: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What prepare counted, by split: of the training rows in every shard, of the validation rows in the first one, which has them."""
    held_out = {"validation": [statistics_of(f"{shards[0]}/validation")]} if spec.data.validation else {}
    return {"train": [statistics_of(f"{shard}/train") for shard in shards]} | held_out


def _training(prefix: str, artifact: Artifact | None) -> dict[str, Any]:
    return {f"{prefix}log": f"{artifact.path}/log.jsonl", f"{prefix}summary": f"{artifact.path}/summary.json"} if artifact else {}


def _timed(task: Mapping[str, Any], times: Mapping[str, float], resolved: Mapping[str, float]) -> dict[str, Any]:
    cached = times.get("started", math.inf) < resolved.get("started", -math.inf)
    return {**task, "start": times.get("started"), "seconds": times.get("seconds"), "status": "cached" if cached else "done"}


def _kept(artifacts: Mapping[str, Artifact]) -> dict[str, Path]:
    """What is published, by its name there."""
    kept: dict[str, Path] = {}
    for task, name in (("distill", ""), ("distill-baseline", "baseline-")):
        if artifact := artifacts.get(task):
            run = Path(artifact.path)
            kept |= {f"logs/{name}{file}": run / file for file in ("log.jsonl", "summary.json", "tensorboard")}
    student = Path(artifacts["distill"].path)
    kept |= {f"student/{checkpoint}": student / checkpoint for checkpoint in ("best", "last")}
    for name, artifact in artifacts.items():
        if name.startswith("projection-"):
            kept[f"projections/{name.removeprefix('projection-')}"] = Path(artifact.path)
    return {name: path for name, path in kept.items() if path.exists()}
