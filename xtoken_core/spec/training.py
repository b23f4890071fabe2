"""Section `training`: the optimisation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from xtoken_core.errors import InputError
from xtoken_core.spec.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class TrainingSpec(Section):
    """The optimisation; names follow transformers.TrainingArguments where it has them."""

    max_steps: PositiveInt = Field(1000, description="optimizer steps")
    global_batch_size: PositiveInt = Field(64, description="rows of one optimizer step, over all ranks")
    micro_batch_size: PositiveInt = Field(1, description="rows of one forward pass on one rank")
    learning_rate: PositiveFloat = 1e-5
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="bf16: autocast over float32 weights; auto: bf16 where GPU or CPU has instructions for it, else fp32"
    )
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile the student")
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    sharding: Literal["ddp", "fsdp"] = Field("ddp", description="how the student spreads over several GPUs")
    log_steps: PositiveInt = 1
    eval_steps: PositiveInt | None = Field(None, description="validate this often; default: only at the end")
    save_steps: PositiveInt | None = Field(None, description="checkpoint this often; default: never")
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], Field(strict=False)] = Field(
        ("tensorboard",), description="trackers; their servers and credentials come from the environment (WANDB_*, MLFLOW_*)"
    )

    @model_validator(mode="after")
    def _steps_and_batches_fit(self) -> Self:
        if self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} leaves nothing of max_steps {self.max_steps}")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size: {self.global_batch_size} is no multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    def accumulation(self, ranks: int) -> int:
        """Micro-batches of a rank in one step. Raises InputError unless a step's rows divide over so many ranks."""
        accumulation, rest = divmod(self.global_batch_size, self.micro_batch_size * ranks)
        if rest:
            raise InputError(
                f"training.global_batch_size: {self.global_batch_size} rows do not divide over {ranks} ranks "
                f"by micro-batches of {self.micro_batch_size}"
            )
        return accumulation
