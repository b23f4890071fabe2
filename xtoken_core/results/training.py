"""A training: log.jsonl and summary.json."""

from __future__ import annotations

from pathlib import Path

from xtoken_core.errors import InputError
from xtoken_core.results.record import Record


class TeacherLine(Record):
    """One teacher's part of a step."""

    kd: float | None = None
    """Distillation loss, unweighted."""
    weight: float | None = None
    chunks: float | None = None
    """Valid chunks, or tokens with the student's vocabulary."""
    seconds: float | None = None
    """Of its forward passes."""


class LogLine(Record):
    """A line of log.jsonl: an optimizer step or a validation."""

    step: int
    loss: float | None = None
    ce: float | None = None
    kd: float | None = None
    """All teachers', weighted."""
    scale: float | None = None
    """The dynamic factor of KD."""
    accuracy: float | None = None
    """Share of next tokens that the student puts first."""
    teachers: dict[str, TeacherLine] = {}
    selected: str | None = None
    """The teacher that select_teacher chose."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    """L2, before clipping."""
    tokens: int | None = None
    """Student tokens so far."""
    tokens_per_second: float | None = None
    seconds_step: float | None = None
    seconds_data: float | None = None
    seconds_teachers: float | None = None
    memory_gib: float | None = None
    """Peak of the student's process and its teachers'."""
    validation_bits_per_byte: float | None = None
    validation_accuracy: float | None = None
    validation_domains: dict[str, float] = {}
    """Bits per byte by domain."""
    silent: dict[str, list[str]] = {}
    """By teacher the domains, empty for all text, on which it is too little ahead of the student to be heard until the next validation."""

    @property
    def of_training(self) -> bool:
        """Whether it is of an optimizer step; numbers of it that were not finite are None."""
        return self.tokens is not None

    def flat(self) -> dict[str, float]:
        """The numbers by name, a teacher's as `kd_<teacher>`: for trackers, which take nothing else."""
        own = self.model_dump(exclude={"step", "selected", "teachers", "validation_domains", "silent"}, exclude_none=True)
        teachers = ((f"{name}_{teacher}", value) for teacher, line in self.teachers.items() for name, value in line)
        return own | {name: value for name, value in teachers if value is not None}


class Environment(Record):
    """Versions, commit and hardware."""

    python: str
    platform: str
    versions: dict[str, str]
    commit: str | None = None
    """Short hash, `+` after it where the working tree differs; None outside a checkout."""
    cpu: str
    cpu_cores: int | None = None
    memory_gib: float
    devices: list[str]
    """Names of the accelerators."""


class TrainingSummary(Record):
    """summary.json, which a training leaves at its end."""

    steps: int
    tokens: int
    seconds: float
    checkpoints: str | None = None
    """Where its checkpoints are kept until the run is published."""
    skipped_steps: int = 0
    """Without an update, since their numbers were not finite."""
    best_step: int | None = None
    best_validation_bits_per_byte: float | None = None
    last_validation_bits_per_byte: float | None = None
    modes: dict[str, str] = {}
    """Loss mode by teacher."""
    resumed_from: int | None = None
    """Step of the checkpoint that the training went on from."""
    parameters: int | None = None
    trainable_parameters: int | None = None
    ranks: int = 1
    precision: str = ""
    environment: Environment | None = None
    seconds_by_phase: dict[str, float] = {}


def read_log(path: str | Path) -> list[LogLine]:
    """The lines of a log.jsonl; a last line cut short is left out. Raises InputError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(LogLine.parse(line, f"{path}: line {number}"))
        except InputError:
            if number < len(lines):
                raise
    return parsed
