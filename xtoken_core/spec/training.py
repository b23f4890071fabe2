"""Section `training`: the optimisation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from xtoken_core.errors import InputError
from xtoken_core.spec.section import (
    LIST_OF_ONE,
    MAX_STEPS,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class TrainingSpec(Section):
    """The optimisation; names follow transformers.TrainingArguments where it has them."""

    max_steps: PositiveInt = Field(1000, description="optimizer steps")
    epochs: Annotated[float, Field(gt=0, le=10_000)] | None = Field(
        None, description="passes over the training rows, in place of max_steps", examples=[1, 0.5]
    )
    global_batch_size: Annotated[int, Field(gt=0, le=10**6)] = Field(64, description="rows of one optimizer step, over all ranks")
    micro_batch_size: Annotated[int, Field(gt=0, le=10**6)] = Field(1, description="rows of one forward pass on one rank")
    learning_rate: PositiveFloat = Field(1e-5, description="peak learning rate of AdamW")
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    warmup_steps: NonNegativeInt = Field(0, description="steps in which the learning rate rises from zero")
    weight_decay: NonNegativeFloat = Field(0.0, description="weight decay of AdamW")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients of a larger norm are scaled down to it")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="seed of the order of the rows, dropout and new weights")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="bf16: autocast over float32 weights; auto: bf16 where GPU or CPU has instructions for it, else fp32"
    )
    activation_checkpointing: bool = Field(False, description="compute activations again in the backward pass, to save memory")
    compile: bool = Field(False, description="torch.compile the layers of the student, and on a GPU of the teachers")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="attention of student and teachers; auto: sdpa for each model that has it, else eager"
    )
    sharding: Literal["ddp", "fsdp"] = Field("ddp", description="how the student spreads over several GPUs")
    log_steps: PositiveInt = Field(1, description="log this often")
    eval_steps: PositiveInt | None = Field(None, description="validate this often; default: only at the end")
    save_steps: PositiveInt | None = Field(None, description="checkpoint this often; default: never")
    skip_nonfinite: NonNegativeInt = Field(
        0, description="steps whose loss or gradients are not finite that are skipped, counted and told; one more ends the run"
    )
    timeout: PositiveFloat = Field(
        600.0,
        description="seconds without a sign of life from a teacher or a rank after which the run ends; a collective waits half as long again",
    )
    report_to: Annotated[tuple[Tracker, ...], Field(strict=False), LIST_OF_ONE] = Field(
        ("tensorboard",), description="trackers; their servers and credentials come from the environment (WANDB_*, MLFLOW_*)"
    )

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        if self.epochs is not None and "max_steps" in self.model_fields_set:
            yield "epochs: stands in place of max_steps; give one of the two"
        if self.epochs is None and self.warmup_steps >= self.max_steps:
            yield f"warmup_steps: {self.warmup_steps} leaves nothing of max_steps {self.max_steps}"
        if self.global_batch_size % self.micro_batch_size:
            yield f"global_batch_size: {self.global_batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"

    def steps(self, rows: int) -> int:
        """Optimizer steps of a training on so many rows: max_steps, or as many as `epochs` passes take, the last one begun counted.

        Raises InputError where epochs make more steps than there may be, or the warm-up leaves none of them.
        """
        if self.epochs is None:
            return self.max_steps
        steps = math.ceil(self.epochs * rows / self.global_batch_size)
        if steps > MAX_STEPS:
            raise InputError(
                f"training.epochs: {self.epochs:g} of {rows} rows are {steps} steps, at most {MAX_STEPS} are allowed"
            )
        if self.warmup_steps >= steps:
            raise InputError(
                f"training.warmup_steps: {self.warmup_steps} leaves nothing of {steps} steps (epochs: {self.epochs:g})"
            )
        return steps

    def accumulation(self, ranks: int) -> int:
        """Micro-batches of a rank in one step. Raises InputError unless a step's rows divide over so many ranks."""
        accumulation, rest = divmod(self.global_batch_size, self.micro_batch_size * ranks)
        if rest:
            raise InputError(
                f"training.global_batch_size: {self.global_batch_size} rows do not divide over {ranks} ranks "
                f"by micro-batches of {self.micro_batch_size}"
            )
        return accumulation
