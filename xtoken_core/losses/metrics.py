"""What is made of a step's sums after the student has run: the metrics, and the scale of the next step."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken_core.losses.totals import StepTotals
from xtoken_core.losses.types import TermSums
from xtoken_core.spec import LossSpec


def sums_vector(terms: TermSums, slots: slice, num_teachers: int) -> Tensor:
    """[3 + 3n] float64: CE, correct tokens, per teacher KD, common and uncommon sums (0 for teachers without a term), and CE of samples
    without a teacher.
    """
    per_teacher = torch.stack([terms.kd.detach(), terms.common, terms.uncommon], 1).flatten()
    if len(terms.kd) < num_teachers:
        per_teacher = torch.nn.functional.pad(per_teacher, (3 * slots.start, 3 * (num_teachers - slots.stop)))
    untaught = torch.zeros_like(terms.correct, dtype=torch.float64) if terms.untaught is None else terms.untaught.double()
    return torch.cat([terms.ce.detach().double()[None], terms.correct[None], per_teacher, untaught[None]])


def _means(sums: Tensor, totals: StepTotals) -> tuple[Tensor, Tensor, Tensor]:
    """CE per token [], each teacher's (KD, common, uncommon) per chunk or token [n, 3], and the aggregated KD []."""
    per_teacher = sums[2:-1].view(-1, 3) / totals.kd_counts.clamp(min=1)[:, None]
    return sums[0] / totals.tokens.clamp(min=1), per_teacher, (totals.kd_weights * per_teacher[:, 0]).sum()


def dynamic_scale(sums: Tensor, totals: StepTotals, spec: LossSpec) -> Tensor:
    """ratio * |CE| / |KD| of a step, 0-dim float64: the factor of KD in the next one; CE's share of taught samples counts.

    1 where KD is 0 or without `dynamic_scaling`; where nothing was taught, the factor stays. `sums` are `LossOutput.sums` (or `loss_sums`)
    over all micro-batches and ranks. KD over unnormalised columns can be negative; its gradient then still points the right way, as in
    NeMo-RL.
    """
    ce, _, kd = _means(sums, totals)
    if not spec.dynamic_scaling:
        return torch.ones_like(ce)
    taught = ce - sums[-1] / totals.tokens.clamp(min=1)
    without = 1.0 if totals.scale is None else torch.where(totals.kd_counts.sum() == 0, totals.scale, 1.0)
    return torch.where(kd != 0, spec.share * taught.abs() / kd.abs(), without)


def untaught_factor(totals: StepTotals, spec: LossSpec) -> float:
    """What the CE of a sample without a teacher gets beside the factor of all CE: what KD has of a sample that is taught."""
    return totals.course * (spec.share if spec.dynamic_scaling else spec.kd_weight)


def loss_metrics(sums: Tensor, totals: StepTotals, spec: LossSpec) -> dict[str, Tensor | float]:
    """`LossOutput.metrics`, from `LossOutput.sums` over all micro-batches and ranks of a step, say."""
    ce, per_teacher, kd = _means(sums, totals)
    scale = totals.course * (totals.scale if spec.dynamic_scaling and totals.scale is not None else torch.ones_like(ce))
    loss = scale * kd + ce if spec.dynamic_scaling else spec.kd_weight * scale * kd + spec.ce_weight * ce
    loss = loss + untaught_factor(totals, spec) * sums[-1] / totals.tokens.clamp(min=1)
    metrics: dict[str, Tensor | float] = {"loss": loss, "kl_loss": kd, "ce_loss": ce, "kl_loss_scale": scale}
    metrics |= {"accuracy": sums[1] / totals.tokens.clamp(min=1), "num_valid_samples": totals.samples}
    if spec.aggregation == "averaged_logits":
        return metrics
    if totals.selected is not None:
        metrics["selected_teacher"] = float(totals.selected)
    for i, mode in enumerate(totals.modes):
        if totals.selected not in (None, i):
            continue
        metrics[f"kl_loss_t{i}"] = per_teacher[i, 0]
        if spec.aggregation == "sum":
            metrics[f"weight_t{i}"] = totals.weights[i]
        if mode is not None:
            metrics[f"num_valid_chunks_t{i}"] = totals.kd_counts[i]
        if mode == "p_kl":
            metrics[f"num_valid_pairs_t{i}"] = totals.kd_counts[i]
        elif mode in ("gold", "h_kl"):
            metrics[f"kl_common_t{i}"], metrics[f"l1_uncommon_t{i}"] = per_teacher[i, 1], per_teacher[i, 2]
    return metrics
