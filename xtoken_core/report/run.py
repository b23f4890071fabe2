"""What a report is made from: the JSON files of one finished (or half finished) run, gathered in a `Run`.

Every part is optional but the spec: a section whose data is missing is left out of the report. Numbers that are not
finite are null. Times are seconds, sizes bytes, losses nats per token, unless a name says otherwise.

`spec`: the whole `DistillationSpec` as JSON (defaults included).

`log`, `baseline_log` (log.jsonl of the student and of its twin trained on cross-entropy alone): one object a line, long ones thinned.
    Training lines: `step`, `loss`, `ce`, `kd`, `kd_<teacher>`, `weight_<teacher>`, `selected` (teacher id), `scale` (the dynamic
    factor of KD), `accuracy` (0..1, next token), `learning_rate`, `grad_norm`, `tokens` (student tokens so far),
    `tokens_per_second`, `seconds_step`, `seconds_teachers`, `seconds_<teacher>`, `memory_gib`.
    Validation lines: `step`, `validation_bits_per_byte`. Other keys are ignored.

`summary`, `baseline_summary` (summary.json of a training): `steps`, `tokens`, `seconds`, `best_step`, `modes` {teacher: loss
    mode}, `parameters`, `resumed_from` (step or null), `seconds_by_phase` {phase: seconds}, `environment` (see
    `xtoken_core.training.environment.describe_environment`).

`results` (one evaluation each): `who` (`student_before`, `student_after_best`, `student_after_last`, `baseline_best`,
    `baseline_last`, `teacher-<id>`), `model`, `bits_per_byte` {`total`, `low`, `high` (95 % interval), `per_corpus` {name: {`total`,
    `low`, `high`, `documents`, `bytes`}}, `documents` {`corpus`: [...], `bits`: [...], `bytes`: [...]}: the same held-out documents in the
    same order for everybody, so that differences are paired}, `tasks` {task: {`metric`, `value`, `low`, `high`, `samples`, `shots`,
    `higher_is_better`, `scores` ("0110": right or wrong, by question), `questions` (their digest), `parts` {task: the same}}}, `agreement` {teacher: {`top1` (0..1), `kl` (nats), `chunks`}}, `tokens_per_second`,
    `samples` [{`prompt`, `text`, `reference`}] (greedy continuations of held-out prompts, the same for everybody).

`overlap`: `student` {`fingerprint`, `size`}, `teachers` {id: {`fingerprint`, `size`, `same_vocabulary`, `shared`, `coefficient`, `coverage` {class:
    {`tokens`, `covered`, `share`}}, `mode`, `reason`}}, `matrix` {`names`, `coefficient` [[0..1]]}.

`projections` {teacher: {`rows`, `columns`, `entries`, `exact`, `multi`, `empty`, `entries_per_row` {count: rows}, `seconds`, `picture` (weights
    of W summed over a grid of bins: student ids down, teacher ids across), `block` {`rows` [text], `columns` [text], `weights` [[0..1]]} (W
    over tokens that people know), `examples` [{`student`, `pieces` [[text, weight]]}]}}.

`prepare` {`train`|`validation`: {`documents`, `rows`, `bytes`, `student_tokens`, `dropped_documents` {reason: documents}, `seconds`, `corpora`
    {name: {`documents`, `bytes`}}, `teachers` {id: {`tokens`, `chunks`, `exact_chunks`}}}}: `stats` in the rows.json of each, of all shards together.

`inputs` (every model and corpus that was read): [{`field` (of the spec), `uri`, `version` (commit of a hub id, else fingerprint)}].

`tasks` (the DAG): [{`name`, `after` [names], `seconds`, `start` (unix time), `status` (`done`, `cached`, `failed`, `running`)}]; of a cached
    one, when it ran and how long it took then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec

FORMAT = 1
"""Version of run.json."""

MAX_LINES = 5000
"""Training lines of a log that are kept; of a longer one every second, third, ... line, so that run.json stays small."""

PathLike = str | Path


@dataclass(frozen=True)
class Run:
    """One run as a report sees it; the module's docstring describes every field."""

    spec: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    """The spec without its defaults, as its author would write it."""
    name: str = ""
    created: str = ""
    """When the report's data was gathered, ISO 8601 in UTC."""
    log: list[dict[str, Any]] = field(default_factory=list)
    baseline_log: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    baseline_summary: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    overlap: dict[str, Any] = field(default_factory=dict)
    projections: dict[str, dict[str, Any]] = field(default_factory=dict)
    prepare: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: list[dict[str, str]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def collect(
        cls,
        spec: str | DistillationSpec,
        *,
        log: PathLike | None = None,
        baseline_log: PathLike | None = None,
        summary: PathLike | None = None,
        baseline_summary: PathLike | None = None,
        results: Iterable[PathLike] = (),
        overlap: PathLike | None = None,
        projections: Mapping[str, PathLike] | None = None,
        prepare: Mapping[str, Mapping[str, Any]] | None = None,
        inputs: Sequence[Mapping[str, str]] = (),
        tasks: Sequence[Mapping[str, Any]] = (),
    ) -> Self:
        """Reads the files a run has left so far; `spec` is it or its JSON. Raises InputError where a file is no JSON."""
        if isinstance(spec, str):
            spec = DistillationSpec.from_text(spec)
        return cls(
            spec=spec.model_dump(mode="json"),
            settings=spec.model_dump(mode="json", exclude_defaults=True),
            name=spec.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            log=thinned(read_lines(log)),
            baseline_log=thinned(read_lines(baseline_log)),
            summary=read_json(summary, {}),
            baseline_summary=read_json(baseline_summary, {}),
            results=[read_json(path, {}) for path in results],
            overlap=read_json(overlap, {}),
            projections={teacher: read_json(path, {}) for teacher, path in (projections or {}).items()},
            prepare={split: dict(counts) for split, counts in (prepare or {}).items()},
            inputs=[dict(entry) for entry in inputs],
            tasks=[dict(task) for task in tasks],
        )

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Reads a run.json that `save` wrote. Raises InputError."""
        if not Path(path).exists():
            raise InputError(f"{path}: no such file: not a finished run?")
        data = read_json(path, {})
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise InputError(f"{path}: not a run.json of format {FORMAT}")
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})

    def save(self, path: PathLike) -> None:
        """Writes run.json, from which `load` restores the run."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text, encoding="utf-8")

    @property
    def teachers(self) -> list[str]:
        """Ids of the teachers, in the spec's order."""
        return [teacher["id"] for teacher in self.spec["teachers"]]

    @property
    def made(self) -> str:
        """When the report was made, for people."""
        return self.created.replace("T", " ").replace("+00:00", " UTC")

    def result(self, who: str) -> dict[str, Any]:
        """The evaluation of `who`; empty where it wasn't evaluated."""
        return next((result for result in self.results if result.get("who") == who), {})

    def steps(self, key: str, *, baseline: bool = False) -> tuple[list[float], list[float]]:
        """The logged values of `key`, as (steps, values), lines without one left out."""
        lines = self.baseline_log if baseline else self.log
        points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float)) and "step" in line]
        return [float(step) for step, _ in points], [float(value) for _, value in points]


def read_json(path: PathLike | None, default: Any) -> Any:
    """The JSON in a file; `default` where there is no file. NaN and infinities become None. Raises InputError."""
    if path is None or not Path(path).exists():
        return default
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not JSON: {e}") from None


def read_lines(path: PathLike | None) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, [] where there is none; a last line cut short is left out. Raises InputError."""
    if path is None or not Path(path).exists():
        return []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(json.loads(line, parse_constant=lambda _: None))
        except ValueError as e:
            if number < len(lines):
                raise InputError(f"{path}: line {number}: not JSON: {e}") from None
    return objects


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MAX_LINES training lines, evenly spread, and every validation line."""
    training = [line for line in lines if "loss" in line]
    kept = {id(line) for line in training[:: max(1, -(-len(training) // MAX_LINES))]}
    return [line for line in lines if "loss" not in line or id(line) in kept]
