"""What the tasks on GPUs take: scores, evaluations, a pilot's short runs, the training and its twin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xtoken_core.errors import InputError
from xtoken_core.results.plan import PlannedTask
from xtoken_core.spec import DistillationSpec
from xtoken_core.spec.pilot import CE
from xtoken_core.workflow.plan_speed import Sizes, Speed
from xtoken_core.workflow.rungs import WITHOUT_TEACHERS, as_candidate, one_host, rungs, short_steps
from xtoken_core.workflow.subjects import Group, groups, subjects

WINDOWS = 2
"""How often a held-out token is read at most, in windows that overlap by half."""


@dataclass(frozen=True)
class Planned:
    """A spec with what is known of its models and its text."""

    spec: DistillationSpec
    sizes: Sizes
    speed: Speed
    steps: int | None
    """Of the main training; None where the rows are unknown."""
    tokens: int | None
    """The student's of all rows."""
    held_out: int | None
    """Tokens of the held-out text."""

    def tasks(self) -> list[PlannedTask]:
        """Every task on a GPU, in the order of the DAG; of evaluations, what bits per byte take.

        Raises InputError for a pilot whose shortest runs have no steps.
        """
        spec = self.spec
        found = [self._scored(t.id) for t in spec.teachers if t.computes_scores]
        asked = groups(spec) if spec.measures_bits else []
        found += [self._evaluated(group) for group in asked if group in (Group.TEACHERS, Group.BEFORE)]
        found += self._tried()
        if not spec.ends_with_pilot:
            found.append(self._trained("distill", spec, self.steps, alone=False))
            if spec.evaluation.ce_baseline:
                found.append(self._trained("distill-baseline", spec, self.steps, alone=True))
            found += [self._evaluated(group) for group in asked if group in (Group.AFTER, Group.BASELINE)]
        return found

    def _scored(self, teacher: str) -> PlannedTask:
        hours = self._forward(f"teachers.{teacher}.model", self.tokens, self.spec.data.max_length)
        return PlannedTask(task=f"score-{teacher}", tokens=self.tokens, gpu_hours=hours)

    def _evaluated(self, group: Group) -> PlannedTask:
        who = [subject.teacher for subject in subjects(self.spec, group)]
        hours = [self._measured("student.model" if teacher is None else f"teachers.{teacher}.model") for teacher in who]
        tokens = None if self.held_out is None else WINDOWS * self.held_out * len(who)
        return PlannedTask(task=f"evaluate-{group}", tokens=tokens, gpu_hours=_sum(hours))

    def _tried(self) -> Iterator[PlannedTask]:
        """A pilot's short runs. Who comes through a rung is not known: the dearest are taken to."""
        pilot = self.spec.pilot
        if pilot is None:
            return
        here = one_host(self.spec)
        dearest = sorted(pilot.candidates, key=lambda c: -self.speed.training(as_candidate(here, c), self.sizes, 1))
        for rung in rungs(pilot):
            known = [(c.name, c) for c in pilot.candidates]
            among = known if rung.number == 1 else [(str(place), c) for place, c in enumerate(dearest[: rung.candidates])]
            for place, candidate in [(CE, WITHOUT_TEACHERS), *among]:
                name = f"trial-{rung.number}-{place}"
                run = self._trained(name, as_candidate(here, candidate), self._short(rung.share), candidate.name == CE)
                yield run.model_copy(update={"gpu_hours": _sum([run.gpu_hours, self._measured("student.model")])})

    def _short(self, share: float) -> int | None:
        """Steps of a short run; where the rows are only estimated too few are not an error yet."""
        try:
            return None if self.steps is None else short_steps(share, self.steps)
        except InputError:
            if self.spec.training.epochs is None:
                raise
            return None

    def _trained(self, task: str, spec: DistillationSpec, steps: int | None, alone: bool) -> PlannedTask:
        if steps is None:
            return PlannedTask(task=task)
        hours = self.speed.training(spec, self.sizes, steps, alone)
        return PlannedTask(task=task, steps=steps, tokens=self.speed.tokens(spec, steps), gpu_hours=hours)

    def _measured(self, field: str) -> float | None:
        """GPU hours of a model's bits per byte."""
        read = None if self.held_out is None else WINDOWS * self.held_out
        return self._forward(field, read, self.spec.context)

    def _forward(self, field: str, tokens: int | None, row: int) -> float | None:
        return None if tokens is None else self.speed.forward(self.sizes[field], tokens, row)


def _sum(hours: list[float | None]) -> float | None:
    known = [value for value in hours if value is not None]
    return sum(known) if len(known) == len(hours) else None
