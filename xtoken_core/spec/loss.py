"""Section `loss`: the distillation loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from xtoken_core.spec.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section


class LossSpec(Section):
    """The distillation loss; formulas in `xtoken_core/losses/reference.py`."""

    mode: Literal["partition_kl", "p_kl", "h_kl", "gold", "auto"] = Field(
        "auto", description="how teachers with a projection are compared; auto: partition_kl, or p_kl where W is learned"
    )
    chunk_distribution: Literal["mean", "first"] = Field(
        "mean", description="p_kl, h_kl, gold: mean over a chunk's rows, or its first row renormalised"
    )
    topk_scope: Literal["sequence", "batch"] = Field(
        "sequence", description="whether the teacher columns are chosen for each sequence or for the whole batch"
    )
    vocab_topk: PositiveInt = Field(8192, description="teacher columns that p_kl and the same-vocabulary KL compare")
    uncommon_topk: PositiveInt = Field(8192, description="sorted uncommon probabilities that gold and h_kl compare")
    temperature: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0, description="softens both distributions; the loss is multiplied by its square"
    )
    reverse_kl: bool = Field(False, description="KL(student || teacher) in place of KL(teacher || student)")
    exact_match_only: bool = Field(False, description="p_kl: only chunks whose text is equal on both sides")
    kd_weight: NonNegativeFloat = Field(1.0, description="factor of KD without dynamic scaling")
    ce_weight: NonNegativeFloat = Field(0.1, description="factor of CE without dynamic scaling")
    dynamic_scaling: Literal["auto"] | bool | PositiveFloat = Field(
        "auto",
        description="rescale KD to this share of CE (true: 1; auto: 1, or 0.3 where every teacher has the student's vocabulary); kd_weight and "
        "ce_weight are then unused",
        examples=[0.3],
    )
    kd_course: Literal["linear", "constant"] = Field(
        "linear", description="KD's factor over the run: falling evenly from all of it to none, or all of it throughout"
    )
    aggregation: Literal["sum", "averaged_logits", "select_teacher"] = Field(
        "sum", description="how several teachers become one loss: weighted sum, mean of their logits, or the teacher of lowest CE"
    )
    weight_metric: Literal["ce", "entropy", "max_prob"] | None = Field(None, description="weight teachers by their confidence")
    alpha: float = Field(1.0, description="sharpness of weight_metric's softmax")
    normalize_by_vocab: bool = Field(False, description="scale each KD (and score) by log V_i / log min V")
    score_unit: Literal["token", "byte"] = Field("token", description="unit of the CE that weights or selects teachers")

    @property
    def separate_terms(self) -> bool:
        """Whether each teacher's KD is a term of its own, with a fixed weight."""
        return self.aggregation == "sum" and self.weight_metric is None

    @property
    def share(self) -> float:
        """KD as a share of CE; 0 without dynamic scaling. Which vocabularies there are a loss does not know: `auto` is 1 here."""
        return 1.0 if self.dynamic_scaling == "auto" else float(self.dynamic_scaling)

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        if self.aggregation != "sum":
            for field in ("weight_metric", "normalize_by_vocab"):
                if getattr(self, field):
                    yield f"{field}: only with aggregation: sum"
        if self.exact_match_only and self.mode != "p_kl":
            yield "exact_match_only: only with mode: p_kl"
        if self.weight_metric is None and self.changed("alpha"):
            yield "alpha: only used with weight_metric"
        if self.score_unit == "byte" and not (self.aggregation == "select_teacher" or self.weight_metric == "ce"):
            yield "score_unit: byte only applies to select_teacher and to weight_metric: ce"
        if not self.dynamic_scaling and not self.kd_weight and not self.ce_weight:
            yield "ce_weight: with kd_weight 0 too nothing is learned"
        for field in ("kd_weight", "ce_weight"):
            if self.dynamic_scaling and self.changed(field):
                yield f"{field}: not used with dynamic_scaling"
