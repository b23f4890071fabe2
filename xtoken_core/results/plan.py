"""What a run will take, before it runs."""

from __future__ import annotations

from xtoken_core.results.record import Record


class PlannedModel(Record):
    """One model of the run."""

    field: str
    """Of the spec."""
    model: str
    parameters: int
    active: int
    """Parameters that one token meets."""
    download_bytes: int
    """Its files; of a hub id its weights in the dtype that its configuration names."""


class PlannedTask(Record):
    """One task on a GPU."""

    task: str
    """Its name in the DAG."""
    steps: int | None = None
    """Optimizer steps of a training."""
    tokens: int | None = None
    """That its models read at most; of a training the student's."""
    gpu_hours: float | None = None


class Plan(Record):
    """Figures of a run by configurations only, or by the speed of a finished one."""

    steps: int | None
    """None: epochs over rows that nobody has counted yet."""
    counted: bool = False
    """Whether rows, tokens and epochs are those that a finished run has counted of the same data, and not bounds."""
    rows_at_least: int | None
    """Of the training data; None where its size is unknown."""
    training_tokens_at_most: int | None
    """The student's: every row of every step full."""
    epochs_at_most: float | None
    models: list[PlannedModel]
    memory: dict[str, int]
    """Bytes by step: of a GPU for distill and the evaluations, of the host for the others."""
    host_memory: dict[str, int] = {}
    """Bytes of the host's memory by kind of evaluation: of teachers (and their scores), and of the student."""
    flops: float | None
    """Of the training, teachers included."""
    gpu_hours: float | None
    """Of the main training, on whose steps a pilot tells."""
    speed: str
    """Where the speed comes from."""
    tasks: list[PlannedTask] = []
    """All on GPUs: scores, evaluations (bits per byte only), a pilot's short runs, trainings; none of a main training that does not follow."""
    disk_bytes: dict[str, int]
    """By what it is for; `trial`: of each short run of a pilot while it runs."""

    @property
    def all_gpu_hours(self) -> float | None:
        """Of all tasks together."""
        hours = [task.gpu_hours for task in self.tasks if task.gpu_hours is not None]
        return sum(hours) if len(hours) == len(self.tasks) else None
