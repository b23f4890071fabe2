"""Successive halving: which short runs a pilot has, what each trains, and who goes on to longer ones.

Every rung doubles the steps and halves the candidates. Each run has its whole schedule, and is measured at its end: the outcome in the
middle of a longer schedule is another one. Cross-entropy only runs on every rung.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from xtoken_core.errors import InputError
from xtoken_core.results.pilot import Trial
from xtoken_core.spec import CandidateSpec, DistillationSpec, PilotSpec
from xtoken_core.spec.pilot import CE

Spec = TypeVar("Spec", bound=DistillationSpec)

WITHOUT_TEACHERS = CandidateSpec.model_construct(name=CE)
"""The candidate that no spec may name."""


@dataclass(frozen=True)
class Rung:
    """Runs of equal length."""

    number: int
    """From 1."""
    candidates: int
    """Besides cross-entropy."""
    share: float
    """Of the main run's steps that each takes."""


def rungs(pilot: PilotSpec) -> list[Rung]:
    """The rungs of a pilot, at least two; all runs together take its budget."""
    count = len(pilot.candidates)
    left = [math.ceil(count / 2**k) for k in range(max(2, math.ceil(math.log2(count)) + 1))]
    unit = pilot.budget / sum((runs + 1) * 2**k for k, runs in enumerate(left))
    return [Rung(k + 1, runs, unit * 2**k) for k, runs in enumerate(left)]


def candidate_of(values: Mapping[str, Any]) -> CandidateSpec:
    """The candidate of these fields, also the one without teachers."""
    return WITHOUT_TEACHERS if values["name"] == CE else CandidateSpec.model_validate_json(json.dumps(dict(values)))


def as_candidate(spec: Spec, candidate: CandidateSpec) -> Spec:
    """The spec as any candidate has it, also the one without teachers."""
    return spec if candidate.name == CE else spec.of_candidate(candidate)


def as_chosen(spec: Spec, candidate: str, baseline: bool) -> tuple[Spec, bool]:
    """The spec that is trained, and whether on cross-entropy only (`baseline`), once a pilot has chosen.

    candidate: what `chosen_candidate` gave; empty: no pilot has chosen, and both stay as they are.
    """
    if not candidate:
        return spec, baseline
    chosen = candidate_of(json.loads(candidate))
    print(f"as the pilot chose: {chosen.name}", flush=True)
    return as_candidate(spec, chosen), chosen.name == CE


def candidates_of(spec: DistillationSpec) -> dict[str, CandidateSpec]:
    """All candidates of a spec's pilot by name, the one without teachers too."""
    return {candidate.name: candidate for candidate in (WITHOUT_TEACHERS, *(spec.pilot.candidates if spec.pilot else ()))}


def chosen_candidate(spec: DistillationSpec, name: str) -> str:
    """The fields of the candidate of this name, as JSON."""
    return candidates_of(spec)[name].model_dump_json(exclude_defaults=True)


def one_host(spec: Spec) -> Spec:
    """The spec on one of its hosts, as short runs are."""
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"nodes": 1})})


def short_steps(share: float, whole: int) -> int:
    """Steps of a short run, of a main run's `whole`. Raises InputError for too few of them."""
    steps = math.floor(share * whole + 1e-9)
    if steps < 2:
        raise InputError(f"pilot.budget: leaves {steps} of {whole} steps to the shortest runs, at least 2 are needed")
    return steps


def trial_spec(spec: Spec, candidate: CandidateSpec, share: float, rows: int) -> Spec:
    """What a short run trains: the spec as the candidate has it, for a share of its steps. Raises InputError for too few of them.

    `rows`: of the training data. Nothing is validated before the end, since nothing is chosen by it.
    """
    steps = short_steps(share, spec.training.steps(rows))
    tried = as_candidate(spec, candidate)
    warmup = min(math.ceil(share * tried.training.warmup_steps), steps - 1)
    training = {"max_steps": steps, "epochs": None, "warmup_steps": warmup, "eval_steps": None, "report_to": ()}
    texts = spec.evaluation.texts or spec.data.validation
    return tried.model_copy(
        update={
            "training": tried.training.model_copy(update=training),
            "data": tried.data.model_copy(update={"validation": ()}),
            "evaluation": tried.evaluation.model_copy(update={"texts": texts}),
        }
    )


@dataclass(frozen=True)
class Place:
    """One task's place in the pilot; no candidate where fewer came through than the rung has places."""

    rung: int
    share: float
    candidate: CandidateSpec | None

    @classmethod
    def of(cls, candidates: Sequence[Mapping[str, Any]], standing: Sequence[str], place: int, rung: int, share: str) -> Place:
        """Place `place` among `standing`, the names of those who came through; on the first rung it is empty, and stands for all."""
        names = list(standing) if rung > 1 else [candidate["name"] for candidate in candidates]
        known = {candidate["name"]: candidate for candidate in candidates}
        chosen = known.get(CE) or (known[names[place]] if place < len(names) else None)
        return cls(rung, float(share), candidate_of(chosen) if chosen else None)


def standing(trials: Sequence[Trial]) -> list[str]:
    """The candidates of a rung that have an outcome, best first, cross-entropy left out."""
    done = [(trial.bits_per_byte, trial.candidate) for trial in trials if trial.bits_per_byte is not None]
    return [candidate for _, candidate in sorted(done) if candidate != CE]
