"""The distillation losses. `distillation_loss` is the one call; `batch_counts` and `StepTotals` make it independent of how a batch is split."""

from xtoken_core.losses.aggregation import (
    LossOutput,
    StepTotals,
    batch_counts,
    distillation_loss,
    dynamic_scale,
    loss_metrics,
    loss_sums,
)
from xtoken_core.losses.scores import teacher_scores
from xtoken_core.losses.types import HiddenLogits, TeacherBatch, TopKLogits

__all__ = [
    "HiddenLogits",
    "LossOutput",
    "StepTotals",
    "TeacherBatch",
    "TopKLogits",
    "batch_counts",
    "distillation_loss",
    "dynamic_scale",
    "loss_metrics",
    "loss_sums",
    "teacher_scores",
]
