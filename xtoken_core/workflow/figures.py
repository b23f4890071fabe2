"""What Kubeflow's run list shows of a step: figures to compare runs by, and facts about what was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from xtoken_core import storage
from xtoken_core.results.evaluation import Evaluation
from xtoken_core.results.pilot import Pilot, Trial
from xtoken_core.results.training import TrainingSummary
from xtoken_core.spec import DistillationSpec


class Metrics(Protocol):
    """KFP's artifact of scalars."""

    uri: str
    path: str
    metadata: dict[str, Any]

    def log_metric(self, metric: str, value: float) -> None:
        """Adds a scalar."""


def log_figures(metrics: Metrics, figures: Mapping[str, float]) -> None:
    """Puts scalars into KFP's artifact, and into its file, if it has a place: a local run takes no step from its cache whose files are gone."""
    for name, value in figures.items():
        metrics.log_metric(name, value)
    if metrics.uri:
        Path(metrics.path).write_text(json.dumps(metrics.metadata), encoding="utf-8")


def read_summary(run: str) -> TrainingSummary:
    """The summary in a folder (a path or URI) that a training wrote. Raises InputError."""
    path = f"{run}/summary.json"
    return TrainingSummary.parse(storage.open_text(path).read(), path)


def training_figures(summary: TrainingSummary) -> dict[str, float]:
    """Scalars of a training."""
    figures = {
        "best_bits_per_byte": summary.best_validation_bits_per_byte,
        "last_bits_per_byte": summary.last_validation_bits_per_byte,
        "best_step": summary.best_step,
        "steps": summary.steps,
        "tokens": summary.tokens,
        "tokens_per_second": summary.tokens / summary.seconds if summary.seconds else None,
    }
    return {name: round(float(value), 4) for name, value in figures.items() if value is not None}


def training_facts(spec: DistillationSpec, summary: TrainingSummary) -> dict[str, str]:
    """What a trained student was made from."""
    facts = {
        "base_model": spec.student.model,
        "teachers": ", ".join(f"{t.id}: {t.model}" for t in spec.teachers if t.id in summary.modes),
        "modes": ", ".join(f"{teacher}: {mode}" for teacher, mode in summary.modes.items()),
        "commit": (summary.environment and summary.environment.commit) or "",
    }
    return {name: value for name, value in facts.items() if value}


def trial_figures(trial: Trial) -> dict[str, float]:
    """Scalars of a short run."""
    figures = {"bits_per_byte": trial.bits_per_byte, "steps": trial.steps, "seconds_per_step": trial.seconds_per_step}
    return {name: round(float(value), 4) for name, value in figures.items() if value is not None}


def pilot_figures(pilot: Pilot) -> dict[str, float]:
    """Scalars of a verdict: the gain that is expected of each candidate over cross-entropy, in bits per byte."""
    return {f"gain_{o.candidate}".replace("-", "_"): round(o.expected.value, 4) for o in pilot.outlooks if o.expected}


def evaluation_figures(results: Sequence[Evaluation]) -> dict[str, float]:
    """Scalars of evaluations: bits per byte and benchmarks of each model."""
    figures: dict[str, float | None] = {}
    for result in results:
        key = result.subject.key.replace("-", "_")
        figures[f"bits_per_byte_{key}"] = result.bits_per_byte.total if result.bits_per_byte else None
        figures |= {f"{task}_{key}": score.value for task, score in result.tasks.items()}
    return {name: round(value, 4) for name, value in figures.items() if value is not None}
