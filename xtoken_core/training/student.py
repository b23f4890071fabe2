"""The student as a module whose forward is the loss: what DDP or FSDP wraps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xtoken_core.losses import HiddenLogits, StepTotals, TeacherBatch, TopKLogits, distillation_loss, loss_sums
from xtoken_core.losses.learnable import LearnableProjection
from xtoken_core.losses.types import Logits
from xtoken_core.models import decoder_layers, final_hidden, head_logits, load_model, prune_layers
from xtoken_core.spec import DistillationSpec, LossSpec

Batch = dict[str, Any]
"""One micro-batch of `xtoken_core.data.batch.Collator`."""


@dataclass(frozen=True)
class MicroBatch:
    """What the student's forward reads of one micro-batch."""

    batch: Batch
    teachers: list[TeacherBatch]


class Student(nn.Module):
    """Model, learnable projections and loss as one module.

    The loss is inside the forward because under FSDP the lm_head and the projections are whole only there.
    """

    accepts_loss_kwargs = True
    """Tells transformers' Trainer that losses come normalised over the whole step."""

    def __init__(self, model: PreTrainedModel, rows: int, learnable: dict[int, LearnableProjection], loss: LossSpec):
        """rows: ids of the student's tokenizer. learnable: by the teacher's index."""
        super().__init__()
        self.model = model
        self.rows = rows
        self.learnable: dict[str, LearnableProjection] = nn.ModuleDict({str(i): w for i, w in learnable.items()})  # type: ignore[assignment]
        self.loss = loss
        self._no_split_modules = model._no_split_modules  # where FSDP wraps

    def forward(self, micro_batch: MicroBatch, totals: StepTotals, with_loss: bool = True) -> dict[str, Tensor]:
        """The micro-batch's share of the step's loss (0-dim, differentiable) and its `LossOutput.sums`; the sums alone without `with_loss`."""
        batch = micro_batch.batch
        hidden = unpacked(final_hidden(self.model, **model_inputs(batch)), batch)
        if torch.is_autocast_enabled(
            hidden.device.type
        ):  # hidden states leave the norm in float32, a Linear would take them in bf16
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        logits = head_logits(self.model, hidden, self.rows)
        teachers = list(micro_batch.teachers)
        for index, projection in self.learnable.items() if teachers else ():
            teachers[int(index)] = replace(teachers[int(index)], projection=projection())
        arguments = logits, batch["input_ids"], batch["token_mask"], batch["sample_mask"], teachers, self.loss
        with torch.autocast(hidden.device.type, enabled=False):
            if not with_loss:
                return {"sums": loss_sums(*arguments, totals)}
            out = distillation_loss(*arguments, totals=totals)
        idle = sum((p.log_weights.sum() for p in self.learnable.values()), torch.zeros((), device=hidden.device))
        return {"loss": out.loss + 0 * idle, "sums": out.sums}  # DDP waits for a gradient of every parameter, used or not


def model_inputs(side: Batch) -> dict[str, Tensor]:
    """What a model reads of one side of a batch: `input_ids`, and of packed rows `position_ids`."""
    read = side.get("packed", side)
    return {name: read[name] for name in ("input_ids", "position_ids") if name in read}


def unpacked(tensor: Tensor, side: Batch) -> Tensor:
    """[R, L, ...] of packed rows as [B, T, ...], one document a sample; of unpacked rows as they are."""
    return tensor.flatten(0, 1)[side["packed"]["gather"]] if "packed" in side else tensor


def unpacked_logits(logits: Logits, side: Batch) -> Logits:
    """The same for whatever a teacher handed over."""
    if isinstance(logits, HiddenLogits):
        return replace(logits, hidden=unpacked(logits.hidden, side))
    if isinstance(logits, TopKLogits):
        return replace(logits, values=unpacked(logits.values, side), indices=unpacked(logits.indices, side))
    assert isinstance(logits, Tensor)
    return unpacked(logits, side)


def teacher_batch(template: TeacherBatch, logits: Logits, batch: Batch, index: int) -> TeacherBatch:
    """Teacher `index`'s view of a micro-batch; `template` holds what is the same in every batch."""
    side = batch["teachers"][index]
    if side is None:  # the student's vocabulary, hence its tokens
        return replace(template, logits=unpacked_logits(logits, batch), token_bytes=batch["token_bytes"])
    names = ("input_ids", "token_mask", "student_chunk_id", "teacher_chunk_id", "chunk_valid", "chunk_exact", "token_bytes")
    return replace(template, logits=unpacked_logits(logits, side), **{name: side[name] for name in names})


def teacher_inputs(batches: Sequence[Batch], index: int, with_scores: bool) -> list[dict[str, Any]]:
    """What teacher `index` is sent of each micro-batch, as numpy arrays (`teachers.process.Inputs`)."""
    return [_inputs(batch["teachers"][index] or batch, batch["sample_mask"], with_scores) for batch in batches]


def _inputs(side: Batch, sample_mask: Tensor, with_scores: bool) -> dict[str, Any]:
    tensors = model_inputs(side)
    if with_scores:
        tensors["sample_mask"] = sample_mask
        tensors |= {f"scored_{name}": side[name] for name in ("input_ids", "token_mask", "token_bytes")}
        if "packed" in side:
            tensors["gather"] = side["packed"]["gather"]
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def student_model(spec: DistillationSpec, checkpoint: Path | None) -> PreTrainedModel:
    """The student in float32, pruned, or as a checkpoint left it."""
    ref = spec.student.model if checkpoint is None else str(checkpoint)
    model = load_model(ref, torch.float32, spec.training.attention, spec.data.packing)
    if checkpoint is None and spec.student.keep_layers is not None:
        prune_layers(model, spec.student.keep_layers)
    return prepare_student(model, spec)


def prepare_student(model: PreTrainedModel, spec: DistillationSpec) -> PreTrainedModel:
    """Sets what the spec's training section asks of the model itself: activation checkpointing, compilation."""
    model.config.use_cache = False
    if spec.training.activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    if spec.training.compile:
        for layer in decoder_layers(model):  # one compilation for all layers, whatever wraps them
            layer.compile()
    return model
