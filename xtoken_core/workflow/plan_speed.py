"""How long a spec's trainings and forward passes take, by the model of a step's time or by a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtoken_core.configs import empty_model, read_config
from xtoken_core.costs import ModelSize, StepShape, forward_seconds, step_seconds
from xtoken_core.errors import InputError
from xtoken_core.layers import prune_layers
from xtoken_core.report.run import Run
from xtoken_core.spec import DistillationSpec
from xtoken_core.spec.pilot import CE
from xtoken_core.workflow.rungs import as_candidate, candidates_of

Sizes = Mapping[str, ModelSize]
"""Of all models by the field that names them, the student's as it is trained."""


def model_refs(spec: DistillationSpec) -> dict[str, str]:
    """Where the models lie, by the field that names them."""
    return {"student.model": spec.student.model} | {f"teachers.{t.id}.model": t.model for t in spec.teachers}


def model_sizes(spec: DistillationSpec) -> dict[str, ModelSize]:
    """Sizes of all models by the field that names them, the student's as it is trained. Raises InputError."""
    sizes = {}
    for field, ref in model_refs(spec).items():
        model = empty_model(ref, read_config(ref))
        if field == "student.model" and spec.student.keep_layers is not None:
            prune_layers(model, spec.student.keep_layers)
        sizes[field] = ModelSize.of(model)
    return sizes


def running(spec: DistillationSpec, sizes: Sizes, alone: bool = False) -> dict[str, ModelSize]:
    """By id the teachers that run in a training, and are not read from scores; none where the student trains `alone`."""
    return {} if alone else {t.id: sizes[f"teachers.{t.id}.model"] for t in spec.teachers if t.scores is None}


def trained_weights(spec: DistillationSpec, size: ModelSize) -> int:
    """Weights of the student that are trained; adapters: two matrices a linear layer, seven layers a block."""
    lora = spec.student.lora
    return size.parameters if lora is None else 14 * lora.rank * size.hidden * size.layers


def training_flops(spec: DistillationSpec, sizes: Sizes, tokens: int, alone: bool = False) -> float:
    """Operations of a training on `tokens` of the student; every teacher that runs is taken to need as many."""
    row, size = spec.data.max_length, sizes["student.model"]
    trained = None if spec.student.lora is None else trained_weights(spec, size)
    student = size.training_flops(tokens, row, spec.training.activation_checkpointing, trained)
    return student + sum(size.forward_flops(tokens, row) for size in running(spec, sizes, alone).values())


def gpus_of(spec: DistillationSpec) -> int:
    """GPUs of a training, at least one."""
    return spec.resources.nodes * max(spec.resources.gpus_per_node, 1)


def step_shape(spec: DistillationSpec, sizes: Sizes, alone: bool = False) -> StepShape:
    """What of a spec the time and memory of a step depend on."""
    training, gpus = spec.training, gpus_of(spec)
    return StepShape(
        rows=training.global_batch_size / gpus,
        length=spec.data.max_length,
        micro_batch=training.micro_batch_size,
        compiled=training.compile,
        recomputed=training.activation_checkpointing,
        trained=None if spec.student.lora is None else trained_weights(spec, sizes["student.model"]),
        fp8=() if alone else tuple(teacher.precision == "fp8" for teacher in spec.teachers if teacher.scores is None),
        gpus=gpus,
    )


@dataclass(frozen=True)
class Speed:
    """How fast operations are done."""

    told: str
    """Where it comes from."""
    measured: float | None = None
    """Operations a second and GPU of a finished run; None: the model of a step's time tells."""
    row: float | None = None
    """Tokens of a row, as that run has counted them; None: rows are taken to be full."""

    @classmethod
    def of(cls, spec: DistillationSpec, sizes: Sizes, finished: Run | None, row: float | None = None) -> Speed:
        """The speed of a finished run's training, or of its pilot where nothing followed that; modelled where there is none.

        row: as of the speed. Raises InputError for a finished run that tells no time.
        """
        if finished is None or (finished.summary is None and finished.pilot is None):
            return cls(f"modelled: H100s, {_step(spec, sizes):.3g} s a step", row=row)
        done, took = _of_training(finished) if finished.summary else _of_pilot(finished)
        if took <= 0:
            raise InputError(f"{finished.name}: the run has no seconds by phase to take a speed from")
        environment = finished.summary.environment if finished.summary else None
        device = environment.devices[0] if environment and environment.devices else "its devices"
        return cls(f"measured: {done / took / 1e12:.3g} TFLOP/s on {device} in the run {finished.name}", done / took, row)

    def tokens(self, spec: DistillationSpec, steps: int) -> int:
        """The student's tokens of a training; at most, where nobody has counted them."""
        return round(steps * spec.training.global_batch_size * (self.row or spec.data.max_length))

    def training(self, spec: DistillationSpec, sizes: Sizes, steps: int, alone: bool = False) -> float:
        """GPU hours of a training; `alone`: on cross-entropy only."""
        if self.measured is None:
            return steps * _step(spec, sizes, alone) * gpus_of(spec) / 3600
        return training_flops(spec, sizes, self.tokens(spec, steps), alone) / self.measured / 3600

    def forward(self, size: ModelSize, tokens: int, row: int) -> float:
        """GPU hours of a model that reads `tokens` in rows of `row`."""
        if self.measured is None:
            return forward_seconds(size, tokens, row) / 3600
        return size.forward_flops(tokens, row) / self.measured / 3600


def _step(spec: DistillationSpec, sizes: Sizes, alone: bool = False) -> float:
    teachers = list(running(spec, sizes, alone).values())
    return step_seconds(sizes["student.model"], teachers, step_shape(spec, sizes, alone)).total


def _of_training(finished: Run) -> tuple[float, float]:
    """Operations of a finished training, and the seconds of one GPU that they took."""
    spec, summary = finished.as_spec(), finished.summary
    assert summary is not None
    seconds = sum(summary.seconds_by_phase.get(phase, 0.0) for phase in ("data", "teachers", "student"))
    return training_flops(spec, model_sizes(spec), summary.tokens), seconds * summary.ranks


def _of_pilot(finished: Run) -> tuple[float, float]:
    """The same of all short runs of a finished pilot together."""
    spec, done, took = finished.as_spec(), 0.0, 0.0
    assert finished.pilot is not None
    sizes, candidates = model_sizes(spec), candidates_of(spec)
    for trial in finished.pilot.trials:
        if trial.seconds_per_step is not None and trial.candidate in candidates:
            tried = as_candidate(spec, candidates[trial.candidate])
            done += training_flops(tried, sizes, trial.tokens, alone=trial.candidate == CE)
            took += trial.steps * trial.seconds_per_step * trial.ranks
    return done, took
