"""The distillation losses. `distillation_loss` is the one call; `batch_counts` and `StepTotals` make it independent of how a batch is split."""

from xtoken_core.losses.aggregation import LossOutput, distillation_loss, loss_sums
from xtoken_core.losses.cell_scores import CellCut, CellScores
from xtoken_core.losses.logits import HiddenLogits, TopKLogits
from xtoken_core.losses.metrics import dynamic_scale, loss_metrics
from xtoken_core.losses.scores import teacher_scores
from xtoken_core.losses.totals import StepTotals, batch_counts
from xtoken_core.losses.types import StudentBatch, TeacherBatch

__all__ = [
    "CellCut",
    "CellScores",
    "HiddenLogits",
    "LossOutput",
    "StepTotals",
    "StudentBatch",
    "TeacherBatch",
    "TopKLogits",
    "batch_counts",
    "distillation_loss",
    "dynamic_scale",
    "loss_metrics",
    "loss_sums",
    "teacher_scores",
]
