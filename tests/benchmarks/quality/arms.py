"""What the lab trains: settings (a student, its teachers, their rows) and arms (a loss and how its size runs over the training)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from xtoken_core.spec import LossSpec


@dataclass(frozen=True)
class LabTeacher:
    """A teacher of a setting."""

    model: str
    """Model folder or .gguf file."""
    projection: str | None = None
    """File of W and cells; None: the student's own vocabulary."""
    columns: int | None = None
    """Number of its columns in the rows; None: its own."""
    precision: str = "bf16"
    """Of its products on a GPU: bf16 or fp8, as `teachers[].precision`."""


@dataclass(frozen=True)
class Setting:
    """A student, its teachers and their rows."""

    name: str
    student: str
    teachers: tuple[LabTeacher, ...]
    data: str
    """Folder of `rows.prepare`: train.npz, and one file for each of `held_out`."""
    held_out: tuple[str, ...] = ("code", "english")
    keep_layers: int | None = None
    rows: int = 12_800
    """Training rows, where a job names no other number."""
    batch: int = 32
    rate: float = 3e-4
    vocabulary: int | None = None
    """Ids of the student's tokenizer; None: as many as its lm_head has rows."""
    as_teacher: bool = False
    """The student reads teacher 0's tokens: a setting of one vocabulary out of rows made for two."""
    tasks: tuple[str, ...] = ()
    """What of `evaluation.tasks` every trained student is asked, `xtoken-offline` say, which choose by likelihood."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    loss: dict[str, Any] | None = None
    """Of `LossSpec`; None: cross-entropy alone."""
    ratio: tuple[float, ...] = (1.0,)
    """KD as a share of CE over the run, at places evenly spaced from its start to its end, linear between; only with dynamic scaling."""
    variant: str | None = None
    """`first_row`: partition_kl without its realised part; `joined`: cells joined that are seen together, as a run has them."""
    teachers: tuple[int, ...] | None = None
    """Which teachers of the setting; None: all."""
    domains: tuple[int | None, ...] | None = None
    """For each teacher of the setting the number of the domain that it is heard on; None: on all."""
    until: tuple[float, ...] | None = None
    """With `domains`, for each teacher of the setting the student's bits per byte on held-out text of its domain at which it falls silent: its
    own over 1 - `teachers[].lead`. The student is asked with the curve. None: all are heard to the end."""
    cells: int | None = None
    """partition_kl: the teachers' likeliest cells of each row that are heard one by one, as from stored scores; None: all."""

    def heard(self, setting: Setting) -> tuple[int, ...]:
        """Numbers of the setting's teachers that it hears."""
        if self.loss is None:
            return ()
        return tuple(range(len(setting.teachers))) if self.teachers is None else self.teachers

    def spec(self) -> LossSpec:
        """Its loss; without one any will do."""
        return LossSpec(**({"mode": "p_kl"} | (self.loss or {})))


@dataclass(frozen=True)
class Job:
    """An arm of a setting with a seed."""

    setting: str
    arm: Arm
    seed: int = 0
    steps: int = 400
    rows: int | None = None
    """Training rows; None: the setting's."""
    rate: float | None = None
    """Learning rate; None: the setting's."""
    batch: int | None = None
    """Rows a step; None: the setting's."""
    save: str | None = None
    """Folder for the trained student, in bf16."""

    @property
    def key(self) -> str:
        """Names its result."""
        changes = {"": self.rate, "rows": self.rows, "batch": self.batch}
        parts = [self.setting, self.arm.name, self.seed, self.steps, *(f"{k}{v}" for k, v in changes.items() if v is not None)]
        return "-".join(map(str, parts))


@dataclass(frozen=True)
class Plan:
    """What one call of `train` works through, in order."""

    settings: tuple[Setting, ...]
    jobs: tuple[Job, ...] = field(default=())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads a plan's JSON."""
        return TypeAdapter(cls).validate_python(json.loads(path.read_text(encoding="utf-8")))

    def setting(self, name: str) -> Setting:
        """By name."""
        return next(setting for setting in self.settings if setting.name == name)

    def ready(self, job: Job) -> bool:
        """Whether every model that the job needs is there."""
        setting = self.setting(job.setting)
        models = [setting.student, *(setting.teachers[n].model for n in job.arm.heard(setting))]
        return all(Path(model).exists() for model in models)
