"""One optimizer step: its micro-batches with what the teachers say of them, its sums, its metrics."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from xtoken_core.data.batch import Batch
from xtoken_core.finite import largest
from xtoken_core.losses import StepTotals, batch_counts, dynamic_scale, loss_metrics
from xtoken_core.results.training import TeacherLine
from xtoken_core.spec import LossSpec
from xtoken_core.teachers.pool import TeacherPool, TeacherRun
from xtoken_core.teachers.setup import Inputs, Logits
from xtoken_core.training.student import MicroBatch, Student
from xtoken_core.training.teachers import ReadyTeacher


class Clock:
    """Splits the time from its making on into phases that follow each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """Ends a phase."""
        now = time.monotonic()
        self.seconds[phase], self._last = now - self._last, now

    @property
    def total(self) -> float:
        """Seconds of all phases so far."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Taught:
    """What the teachers gave for the micro-batches of a step on this rank."""

    micro_batches: list[MicroBatch]
    counts: Tensor
    """`batch_counts`, summed over the micro-batches."""
    seconds: Mapping[str, float]
    """By teacher: onload, run and offload."""
    finite: Mapping[str, bool]
    """By teacher: whether all that it handed over is."""


@dataclass
class Teaching:
    """The teachers of a training and the processes in which they run."""

    teachers: tuple[ReadyTeacher, ...] = ()
    pool: TeacherPool | None = None
    """None: no teacher is run, since there are none or only scores of them."""
    silent: Mapping[str, Collection[str]] = field(default_factory=dict)
    """By teacher the domains on which it is not heard."""

    def run(self, batches: Sequence[Batch], loss: LossSpec) -> Taught:
        """Runs the teachers over all micro-batches of a step, one teacher after another."""
        batches = [self._heard(batch) for batch in batches]
        runs = self.run_processes(batches)
        micro_batches, counts = [], []
        for n, batch in enumerate(batches):
            micro_batches.append(self._micro_batch(batch, {name: run.logits[n] for name, run in runs.items()}))
            counts.append(self._counts(micro_batches[n], {name: run.scores[n] for name, run in runs.items() if run.scores}, loss))
        seconds = {t.id: runs[t.id].seconds if t.id in runs else 0.0 for t in self.teachers}
        finite = {t.id: runs[t.id].finite if t.id in runs else True for t in self.teachers}
        return Taught(micro_batches, torch.stack(counts).sum(0), seconds, finite)

    def rehearsal(self, batch: Batch, loss: LossSpec) -> Taught:
        """What the teachers would give for one micro-batch, in form: in place of their outputs are random numbers."""
        batch = self._heard(batch)
        of = zip(self._live, self.pool.teachers if self.pool is not None else ())
        made_up = {t.id: teacher.made_up(batch.teacher_inputs(i, with_scores=False)) for (i, t), teacher in of}
        micro_batch = self._micro_batch(batch, made_up)
        return Taught([micro_batch], self._counts(micro_batch, {}, loss), {}, {})

    def _micro_batch(self, batch: Batch, logits: Mapping[str, Logits]) -> MicroBatch:
        """logits: by id, of the teachers that are run."""
        heard = {
            t.id: t.batch(logits[t.id] if t.id in logits else batch.scored[i], batch.teachers[i], taught)
            for i, (t, taught) in enumerate(zip(self.teachers, batch.taught))  # a baseline hears none
        }
        return MicroBatch(batch, heard)

    def _counts(self, micro_batch: MicroBatch, given: Mapping[str, Sequence[float]], loss: LossSpec) -> Tensor:
        """`batch_counts` of a micro-batch. given: scores by id; no others have any."""
        scores = [torch.tensor(given.get(t.id, [0.0, 0.0]), dtype=torch.float64) for t in self.teachers]
        return batch_counts(*micro_batch.batch.masks, list(micro_batch.teachers.values()), loss, scores)

    def _heard(self, batch: Batch) -> Batch:
        """The batch as far as teachers are heard."""
        for i, teacher in enumerate(self.teachers):
            if domains := self.silent.get(teacher.id):
                batch = batch.unheard(i, domains)
        return batch

    def run_processes(self, batches: Sequence[Batch], in_training: bool = True) -> dict[str, TeacherRun]:
        """Runs the teachers that have a process; what each gave, by id. in_training: see `TeacherPool.run`."""
        if self.pool is None or not self._live:
            return {}
        runs = self.pool.run(self._inputs(batches), in_training)
        return {t.id: run for (_, t), run in zip(self._live, runs)}

    def warm_up(self, batches: Sequence[Batch]) -> bool:
        """Has the teachers compile for a first step: see `TeacherPool.warm_up`."""
        return self.pool is not None and self.pool.warm_up(self._inputs([self._heard(batch) for batch in batches]))

    @property
    def _live(self) -> list[tuple[int, ReadyTeacher]]:
        """The teachers that have a process, with their place in the spec."""
        return [(i, t) for i, t in enumerate(self.teachers) if t.setup is not None]

    def _inputs(self, batches: Sequence[Batch]) -> list[list[Inputs]]:
        """What each teacher that has a process is sent."""
        return [[b.teacher_inputs(i, bool(t.setup and t.setup.scores)) for b in batches] for i, t in self._live]

    def check(self) -> None:
        """Raises TeacherError if a teacher has died."""
        if self.pool is not None:
            self.pool.check()

    def release(self) -> None:
        """Gives the outputs of the last run back."""
        if self.pool is not None:
            self.pool.release()


@dataclass
class Step:
    """One optimizer step on this rank, from the student's first forward to its metrics."""

    micro_batches: list[MicroBatch]
    totals: StepTotals
    """Of the global batch."""
    tokens: Tensor
    """0-dim int64: the student's tokens on this rank."""
    teacher_seconds: Mapping[str, float]
    finite: Mapping[str, bool]
    """By teacher: whether what it handed over to this rank is."""
    clock: Clock
    skipped: bool = False
    """Whether the weights stay as they are, since the numbers are not finite."""
    sums: Tensor = field(init=False)
    """`LossOutput.sums` of the micro-batches so far."""

    def __post_init__(self) -> None:
        size = 3 + 3 * len(self.totals.modes)
        self.sums = torch.zeros(size, dtype=torch.float64, device=self.totals.tokens.device)

    def add(self, sums: Tensor) -> None:
        """Adds a micro-batch's sums."""
        self.sums = self.sums + sums

    def fault(self) -> str:
        """Whose numbers are not finite, over all ranks, which all call this."""
        device, ids = self.sums.device, list(self.finite)
        broken = over_ranks(torch.tensor([not self.finite[name] for name in ids], dtype=torch.float64), device).tolist()
        ce, _, *rest, _ = over_ranks(self.sums.clone(), device).tolist()
        for name, count in zip(ids, broken):
            if count:
                return f"teacher {name}: its outputs are not finite"
        if not math.isfinite(ce):
            return "student: its loss is not finite"
        for name, kd in zip(ids, rest[::3]):
            if not math.isfinite(kd):
                return f"student: its divergence from teacher {name} is not finite"
        return "student: its gradients are not finite"

    def finish(self, loss: LossSpec) -> StepResult:
        """Ends the step: its sums over all ranks, which all call this."""
        reduced = over_ranks(torch.cat([self.sums, self.tokens.double()[None]]), self.sums.device)
        sums, tokens = reduced[:-1], int(reduced[-1])
        numbers = {name: float(value) for name, value in loss_metrics(sums, self.totals, loss).items()}
        scale = float(dynamic_scale(sums, self.totals, loss))
        self.clock.lap("student")
        seconds = self.clock.seconds
        ids = list(self.micro_batches[0].teachers)
        metrics = {
            "loss": numbers["loss"],
            "ce": numbers["ce_loss"],
            "kd": numbers["kl_loss"],
            "selected": ids[int(numbers["selected_teacher"])] if "selected_teacher" in numbers else None,
            "teachers": {name: _teacher_line(numbers, i, self.teacher_seconds[name]) for i, name in enumerate(ids)},
            "scale": numbers["kl_loss_scale"],
            "accuracy": numbers["accuracy"],
            "tokens_per_second": tokens / self.clock.total,
            "seconds_step": self.clock.total,
            "seconds_data": seconds["data"],
            "seconds_teachers": seconds["teachers"],
        }
        return StepResult(metrics, scale, tokens, seconds)


@dataclass(frozen=True)
class StepResult:
    """What a finished step was like."""

    metrics: dict[str, Any]
    """Fields of its line in the log."""
    scale: float
    """Dynamic scaling's factor for the next step."""
    tokens: int
    """The student's tokens, over all ranks."""
    seconds: dict[str, float]
    """By phase: data, teachers, student."""


def begin_step(
    batches: Sequence[Batch], teaching: Teaching, student: Student, scale: float | None, course: float, clock: Clock
) -> Step:
    """Runs the teachers and decides counts, weights and scale of the step from sums over all ranks, which all call this.

    scale: dynamic scaling's factor from the step before; None: there was none, and this step's own sums give it.
    course: what is left of KD's factor (`kd_course`).
    clock: has run since the step began.
    """
    clock.lap("data")
    device = batches[0].sample_mask.device
    if teaching.warm_up(batches) and not isinstance(student, FSDPModule):  # whose passes wait for those of all ranks
        _rehearse(batches, teaching, student)
    taught = teaching.run(batches, student.loss)
    heard = list(taught.micro_batches[0].teachers.values())
    totals = StepTotals.from_sums(over_ranks(taught.counts, device), heard, student.loss, scale=scale if heard else 1.0)
    totals = replace(totals, course=course)
    clock.lap("teachers")
    if student.loss.dynamic_scaling and totals.scale is None:  # the first step: its own sums, before its gradients
        sums = _sums(student, taught.micro_batches, totals)
        totals = totals.with_scale(dynamic_scale(over_ranks(sums, device), totals, student.loss))
    tokens = torch.stack([batch.student.attention_mask.sum() for batch in batches]).sum()
    return Step(taught.micro_batches, totals, tokens, taught.seconds, taught.finite, clock)


def _sums(student: Student, micro_batches: Sequence[MicroBatch], totals: StepTotals) -> Tensor:
    """`LossOutput.sums` of a step without gradients. It happens once: code for it would take longer to compile than it does."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return torch.stack([student(m, totals, with_loss=False)["sums"] for m in micro_batches]).sum(0)


def _rehearse(batches: Sequence[Batch], teaching: Teaching, student: Student) -> None:
    """Compiles what the student's part of a step takes while the teachers compile theirs. Nothing of it stays but the code.

    What fails, since memory does not suffice for all of them at once, is left to the step itself, which tells what else is wrong.
    """
    training, device = student.training, batches[0].sample_mask.device
    devices = [device] if device.type == "cuda" else []
    shapes = [batch.student.model_inputs()["input_ids"].shape for batch in batches]
    another = next((n for n, shape in enumerate(shapes) if shape != shapes[0]), 0)  # for which code is made that suits all
    # RuntimeError: cuBLAS and Triton have no name for too little memory
    with torch.random.fork_rng(devices), contextlib.suppress(RuntimeError):
        for n in sorted({0, another}):
            taught = teaching.rehearsal(batches[n], student.loss)
            heard = list(taught.micro_batches[0].teachers.values())
            totals = StepTotals.from_sums(taught.counts.to(device), heard, student.loss, scale=1.0)
            _sums(student, taught.micro_batches, totals)
            student.train()(taught.micro_batches[0], totals)["loss"].backward()
    student.train(training)
    for parameter in student.parameters():
        parameter.grad = None


def over_ranks(sums: Tensor, device: torch.device) -> Tensor:
    """Sums over the data-parallel ranks, on `device`."""
    sums = sums.to(device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return sums


def all_finite(tensors: Iterable[Tensor | None], device: torch.device) -> bool:
    """Whether every number is finite, over all ranks, which all call this with their shares. Only floating-point tensors count."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    return float(over_ranks((~largest(local).isfinite()).double(), device)) == 0


def _teacher_line(metrics: Mapping[str, float], index: int, seconds: float) -> TeacherLine:
    """The metrics of one teacher."""
    return TeacherLine(
        kd=metrics.get(f"kl_loss_t{index}"),
        weight=metrics.get(f"weight_t{index}"),
        chunks=metrics.get(f"num_valid_chunks_t{index}"),
        seconds=seconds,
    )
