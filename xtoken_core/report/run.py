"""What a report is made from: the results of one finished (or half finished) run, gathered in a `Run`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from xtoken_core.errors import InputError
from xtoken_core.results.evaluation import Evaluation
from xtoken_core.results.pilot import Pilot
from xtoken_core.results.record import Record, text_of
from xtoken_core.results.rows import RowStatistics
from xtoken_core.results.subject import BEST, LAST, Subject
from xtoken_core.results.training import LogLine, TrainingSummary, read_log
from xtoken_core.results.vocabulary import OverlapReport, ProjectionStats
from xtoken_core.results.workflow import PipelineRun, Prepared, ReadInput, Task
from xtoken_core.spec import DistillationSpec
from xtoken_core.storage import RUN_FILE, is_remote, local_copy, normalize

FORMAT = 2
"""Version of run.json."""

MAX_LINES = 5000
"""Training lines of a log that are kept; of a longer one every second, third, ... line, so that run.json stays small."""


@dataclass(frozen=True)
class TrainingFiles:
    """The folder that a training wrote, read."""

    log: list[LogLine]
    summary: TrainingSummary | None

    @classmethod
    def of(cls, folder: str | Path | None) -> Self:
        """Reads what is there so far; None: nothing. Raises InputError."""
        if folder is None:
            return cls([], None)
        log, summary = Path(folder) / "log.jsonl", Path(folder) / "summary.json"
        return cls(thinned(read_log(log)) if log.exists() else [], TrainingSummary.read(summary) if summary.exists() else None)


class Run(Record):
    """One run as a report sees it, and run.json. A section of the report whose part is missing is left out."""

    format: int
    spec: dict[str, Any]
    """The whole `DistillationSpec` as JSON, defaults included."""
    settings: dict[str, Any] = {}
    """The spec without its defaults, as its author would write it."""
    name: str = ""
    created: str = ""
    """When the report's data was gathered, ISO 8601 in UTC."""
    log: list[LogLine] = []
    baseline_log: list[LogLine] = []
    """Of the student's twin trained on cross-entropy only."""
    summary: TrainingSummary | None = None
    baseline_summary: TrainingSummary | None = None
    results: list[Evaluation] = []
    pilot: Pilot | None = None
    overlap: OverlapReport | None = None
    projections: dict[str, ProjectionStats] = {}
    """By teacher."""
    prepare: dict[str, RowStatistics] = {}
    """Of all shards together, by split: train, validation."""
    inputs: list[ReadInput] = []
    tasks: list[Task] = []
    prepared: Prepared = Prepared()
    pipeline_run: PipelineRun | None = None
    """None for a run on one machine."""

    @classmethod
    def collect(
        cls,
        spec: DistillationSpec,
        training: str | Path | None = None,
        baseline: str | Path | None = None,
        **parts: Any,
    ) -> Self:
        """Gathers a run. `training`, `baseline`: the folders that trainings wrote; `parts`: the other fields. Raises InputError."""
        student, twin = TrainingFiles.of(training), TrainingFiles.of(baseline)
        return cls(
            format=FORMAT,
            spec=spec.model_dump(mode="json"),
            settings=spec.model_dump(mode="json", exclude_defaults=True),
            name=spec.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            log=student.log,
            summary=student.summary,
            baseline_log=twin.log,
            baseline_summary=twin.summary,
            **parts,
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a run.json that `save` wrote. Raises InputError."""
        text = text_of(path)
        try:
            written_as = json.loads(text).get("format")
        except (ValueError, AttributeError, RecursionError):
            written_as = None
        if written_as != FORMAT:
            raise InputError(f"{path}: not a run.json of format {FORMAT}")
        run = cls.parse(text, path)
        return run.model_copy(update={"spec": run.as_spec(f"{path}: settings").model_dump(mode="json")})

    @classmethod
    def published(cls, uri: str) -> Self:
        """The run that is published at `uri`, a spec's `output.uri`. Raises InputError."""
        place = uri.rstrip("/") or uri
        if not is_remote(place) and not (Path(normalize(place)) / RUN_FILE).exists():
            raise InputError(f"{uri}: no finished run lies there (a folder with {RUN_FILE}); give what its output.uri said")
        return cls.load(local_copy(f"{place}/{RUN_FILE}"))

    def save(self, path: str | Path) -> None:
        """Writes run.json, from which `load` restores the run."""
        Path(path).write_text(self.model_dump_json(exclude_none=True), encoding="utf-8")

    def as_spec(self, source: str = "settings") -> DistillationSpec:
        """The spec that was run. Raises InputError, with `source` in its lines, for one that this version does not take."""
        return DistillationSpec.from_text(json.dumps(self.settings), source=source)

    @property
    def teachers(self) -> list[str]:
        """Ids of the teachers, in the spec's order."""
        return [teacher["id"] for teacher in self.spec["teachers"]]

    @property
    def heard(self) -> list[str]:
        """Ids of the teachers that the student learned from: where a pilot chose, those of its candidate, none of cross-entropy only.

        Of a pilot that nothing has followed, all that it may learn from.
        """
        if self.pilot is None or self.summary is None:
            return self.teachers
        return next((o.teachers for o in self.pilot.outlooks if o.candidate == self.pilot.chosen), [])

    @property
    def made(self) -> str:
        """When the report was made, for people."""
        return self.created.replace("T", " ").replace("+00:00", " UTC")

    def result(self, subject: Subject) -> Evaluation | None:
        """The evaluation of a subject; None where it was not evaluated."""
        return next((result for result in self.results if result.subject == subject), None)

    @property
    def after(self) -> Evaluation | None:
        """The evaluation of the student after distillation: of the best checkpoint, else of the last."""
        return self.result(BEST) or self.result(LAST)

    def steps(self, field: str, *, teacher: str | None = None, baseline: bool = False) -> tuple[list[float], list[float]]:
        """The logged values of a field of `LogLine` (of `TeacherLine`, for one teacher), as (steps, values), lines without one left out."""
        lines = self.baseline_log if baseline else self.log
        parts = [(line.step, line if teacher is None else line.teachers.get(teacher)) for line in lines]
        points = [(step, value) for step, part in parts if (value := getattr(part, field, None)) is not None]
        return [float(step) for step, _ in points], [float(value) for _, value in points]


def thinned(lines: Sequence[LogLine]) -> list[LogLine]:
    """At most MAX_LINES training lines, evenly spread, and every validation line."""
    training = [line for line in lines if line.of_training]
    kept = {id(line) for line in training[:: max(1, -(-len(training) // MAX_LINES))]}
    return [line for line in lines if not line.of_training or id(line) in kept]
