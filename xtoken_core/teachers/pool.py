"""The serial schedule of a step's teachers, and which of them stay on the GPU between steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from xtoken_core.costs import GIB
from xtoken_core.teachers.handle import Teacher
from xtoken_core.teachers.setup import Inputs, Logits, TeacherSetup

logger = logging.getLogger(__name__)

HEADROOM = 0.03
"""Share of the GPU's memory that `auto` leaves free: fragmentation, and rows longer than those of the first step."""


@dataclass(frozen=True)
class TeacherRun:
    """What one teacher gave for a step's rank-local global batch."""

    logits: list[Logits]
    """Per micro-batch; valid until the pool's next run or release."""
    scores: list[list[float]]
    """Per micro-batch, (sum, count) of the teacher's score; empty where the loss needs none."""
    seconds: float
    """Onload, run and offload."""
    finite: bool
    """Whether every number of `logits` is."""


@dataclass(frozen=True)
class Event:
    """One thing a teacher process did, by its own (system-wide monotonic) clock."""

    teacher: str
    what: str
    started: float
    ended: float


class TeacherPool:
    """The teachers of one rank. A context manager: processes start on entry and are gone after exit, whatever happens."""

    def __init__(self, setups: Sequence[TeacherSetup]):
        self._setups = setups
        self._runs = 0
        self._warming: list[Teacher] = []
        self.teachers: list[Teacher] = []
        self.events: list[Event] = []
        """What happened in the last run, in order of the replies."""

    def __enter__(self) -> Self:
        """Starts the processes, which load their models at the same time. Raises InputError or TeacherError."""
        try:
            self.teachers.extend(map(Teacher, self._setups))
            for teacher in self.teachers:
                teacher.wait_ready()
                if teacher.setup.residency == "offload":
                    teacher.call("settle", False)
                on_cpu = teacher.setup.device.type == "cpu"  # where there is nowhere to offload to
                teacher.resident = teacher.setup.residency == "resident" or (teacher.setup.residency == "auto" and on_cpu)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases outputs and ends the processes, each once."""
        for teacher in self.teachers:
            teacher.close()

    def release(self) -> None:
        """Gives the last run's outputs back, once per teacher."""
        for teacher in self.teachers:
            teacher.release()

    def check(self) -> None:
        """Raises TeacherError if a teacher has died."""
        for teacher in self.teachers:
            teacher.check()

    def warm_up(self, inputs: Sequence[Sequence[Inputs]]) -> bool:
        """Before the first run: has the teachers compile what it takes, all at the same time, and returns at once. Whether there is a need.

        A teacher that is spread over ranks compiles in its run.
        """
        if self._runs == 0 and not self._warming:
            for teacher, batches in zip(self.teachers, inputs):
                if teacher.setup.compile and teacher.setup.shards is None:
                    teacher.begin("warm_up", batches)
                    self._warming.append(teacher)
        return bool(self._warming)

    def run(self, inputs: Sequence[Sequence[Inputs]], in_training: bool = True) -> list[TeacherRun]:
        """Runs the teachers one after another; `inputs[i]` are the micro-batches of teacher i.

        A teacher that does not stay on the GPU is brought there, runs, and has left before the next one begins.
        in_training: the student's step follows, whose peak of memory then decides which teachers stay.
        """
        while self._warming:
            self._warming.pop().finish("warm_up")
        on_gpu = any(t.setup.device.type == "cuda" for t in self.teachers)
        if on_gpu:
            torch.cuda.synchronize()  # the student may still read the last step's outputs
            if self._runs == 1 and in_training:
                self._settle()
            if not all(t.resident for t in self.teachers):
                torch.cuda.empty_cache()  # the student's idle memory is the teachers' room
        self._runs += in_training
        self.release()
        self.events.clear()
        return [self._run_one(teacher, batches) for teacher, batches in zip(self.teachers, inputs)]

    def _run_one(self, teacher: Teacher, batches: Sequence[Inputs]) -> TeacherRun:
        first = len(self.events)
        if not teacher.resident:
            self._note(teacher, "onload", teacher.call("onload"))
        logits, result = teacher.run(batches)
        teacher.info.update({key: result[key] for key in ("host_bytes", "working_bytes") if key in result})
        self._note(teacher, "run", result)
        if not teacher.resident:
            self._note(teacher, "offload", teacher.call("offload"))
        seconds = self.events[-1].ended - self.events[first].started
        return TeacherRun(logits, result["scores"], seconds, result["finite"])

    def _note(self, teacher: Teacher, what: str, result: dict[str, Any]) -> None:
        self.events.append(Event(teacher.setup.name, what, result["started"], result["ended"]))

    def _settle(self) -> None:
        """After the first step, when the student's peak is known: keeps `auto` teachers on the GPU while they fit."""
        device = self.teachers[0].setup.device
        free, total = torch.cuda.mem_get_info(device)
        room = free - HEADROOM * total
        need = {id(t): t.info["weight_bytes"] + t.info["working_bytes"] for t in self.teachers}
        for teacher in self.teachers:
            if teacher.setup.residency != "auto":
                continue
            largest_guest = max((need[id(t)] for t in self.teachers if not t.resident and t is not teacher), default=0)
            teacher.resident = need[id(teacher)] + largest_guest <= room
            teacher.call("settle", teacher.resident)
            logger.info(
                "%s: %s: %.1f GiB for weights and work, %.1f GiB of the GPU free beside the student's peak",
                teacher.setup.name,
                "stays on the GPU" if teacher.resident else "is offloaded after each step",
                need[id(teacher)] / GIB,
                room / GIB,
            )
            if teacher.resident:
                room -= need[id(teacher)]
