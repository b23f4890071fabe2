"""The student as a module whose forward is the loss: what DDP or FSDP wraps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xtoken_core.configs import compute_dtype
from xtoken_core.data.batch import Batch
from xtoken_core.layers import decoder_layers, prune_layers
from xtoken_core.losses import StepTotals, StudentBatch, TeacherBatch, distillation_loss, loss_sums
from xtoken_core.losses.learnable import LearnableProjection
from xtoken_core.models import Loaded, final_hidden, head_logits, load_model
from xtoken_core.spec import DistillationSpec, LossSpec, TrainingSpec
from xtoken_core.training.adapters import add_adapters, check_lora


@dataclass(frozen=True)
class MicroBatch:
    """What the student's forward reads of one micro-batch."""

    batch: Batch
    teachers: Mapping[str, TeacherBatch]
    """By id, in the spec's order; empty: cross-entropy alone."""


class Student(nn.Module):
    """Model, learnable projections and loss as one module.

    The loss is inside the forward because under FSDP the lm_head and the projections are whole only there.
    """

    accepts_loss_kwargs = True
    """Tells transformers' Trainer that losses come normalised over the whole step."""

    def __init__(self, loaded: Loaded, loss: LossSpec, learnable: Mapping[str, LearnableProjection]):
        """learnable: by the teacher's id."""
        super().__init__()
        self.model, self.rows = loaded.model, loaded.rows
        self.tokenizer, self.table = loaded.tokenizer, loaded.table
        self.learnable: dict[str, LearnableProjection] = nn.ModuleDict({_slot(i): w for i, w in learnable.items()})  # type: ignore[assignment]
        self.loss = loss
        self._no_split_modules = loaded.model._no_split_modules  # where FSDP wraps

    def forward(self, micro_batch: MicroBatch, totals: StepTotals, with_loss: bool = True) -> dict[str, Tensor]:
        """The micro-batch's share of the step's loss (0-dim, differentiable) and its `LossOutput.sums`; the sums alone without `with_loss`."""
        side = micro_batch.batch.student
        hidden = side.unpacked(final_hidden(self.model, **side.model_inputs()))
        if torch.is_autocast_enabled(hidden.device.type):  # they leave the norm in float32, a Linear would take them in bf16
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        logits = head_logits(self.model, hidden, self.rows)
        masks = micro_batch.batch.masks
        teachers = [self._with_learned(i, teacher) for i, teacher in micro_batch.teachers.items()]
        with torch.autocast(hidden.device.type, enabled=False):
            if not with_loss:
                return {"sums": loss_sums(StudentBatch.of(logits, *masks), teachers, self.loss, totals)}
            out = distillation_loss(logits, *masks, teachers, self.loss, totals=totals)
        idle = sum((p.log_weights.sum() for p in self.learnable.values()), torch.zeros((), device=hidden.device))
        return {"loss": out.loss + 0 * idle, "sums": out.sums}  # DDP waits for a gradient of every parameter, used or not

    def _with_learned(self, teacher_id: str, teacher: TeacherBatch) -> TeacherBatch:
        slot = _slot(teacher_id)
        return replace(teacher, projection=self.learnable[slot]()) if slot in self.learnable else teacher

    def model_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's own part of a state dict of this module."""
        return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}

    def learned_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`log_weights` of each trained W by teacher id, on the CPU, from a state dict of this module."""
        return {
            slot.removeprefix(_SLOT): state[f"learnable.{slot}.log_weights"].detach().cpu().contiguous()
            for slot in self.learnable
        }


_SLOT = "teacher-"


def _slot(teacher_id: str) -> str:
    """The name of a W among the modules: an id alone could be that of a method, such as `double`."""
    return f"{_SLOT}{teacher_id}"


def student_model(spec: DistillationSpec, checkpoint: Path | None) -> PreTrainedModel:
    """The student, pruned, or as a checkpoint left it: in float32, or with `lora` in the compute dtype, adapters in float32."""
    student, training = spec.student, spec.training
    if student.lora is not None:
        check_lora()
    whole = checkpoint if student.lora is None else None  # of an adapted student, a checkpoint holds the adapters
    dtype = torch.float32 if student.lora is None else compute_dtype(training.precision)
    model = load_model(student.model if whole is None else str(whole), dtype, training.attention, spec.data.packing)
    if whole is None and student.keep_layers is not None:
        prune_layers(model, student.keep_layers)
    if student.lora is not None:
        torch.manual_seed(training.seed)  # which decides the adapters' first weights too
        add_adapters(model, student.lora, checkpoint)
    return prepare_student(model, training)


def prepare_student(model: PreTrainedModel, training: TrainingSpec) -> PreTrainedModel:
    """Sets what the training section asks of the model itself: activation checkpointing, compilation."""
    if training.activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    if training.compile:
        torch._dynamo.config.optimize_ddp = False  # it would cut each layer into buckets of gradients, and compile every part
        for layer in decoder_layers(model):  # one compilation for all layers, whatever wraps them
            layer.compile()
    return model
