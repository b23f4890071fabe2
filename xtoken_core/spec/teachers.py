"""Section `teachers`: the models that are learned from, each with its projection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from xtoken_core.spec.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section, Strings, Uri

Mode = Literal["partition_kl", "p_kl", "h_kl", "gold"]


class ProjectionSpec(Section):
    """How the projection matrix W (student vocabulary x teacher vocabulary) of one teacher is made."""

    uri: Uri | None = Field(
        None,
        description="reuse a stored W (.safetensors, or NeMo-RL's .pt) in place of building one",
        examples=["s3://bucket/run/projections/qwen"],
    )
    top_k: Annotated[int, Field(gt=0, le=64)] = Field(4, description="entries kept per student token")
    reverse_pass: bool = Field(False, description="also map the teacher's tokens back through the student's tokenizer")
    learnable: bool = Field(False, description="train the weights of W's nonzeros with the student")
    learning_rate: PositiveFloat = Field(1e-2, description="learning rate of W's weights, when learnable")

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        if self.uri is not None and {"top_k", "reverse_pass"} & self.model_fields_set:
            yield "uri: a stored projection is taken as it is; top_k and reverse_pass only apply to one that is built"
        if not self.learnable and "learning_rate" in self.model_fields_set:
            yield "learning_rate: only used with learnable: true"


class ScoresSpec(Section):
    """What a teacher says of the rows, computed once by the score step: no teacher runs in the training."""

    top_k: Annotated[int, Field(gt=0, le=2**20)] = Field(
        64, description="likeliest next tokens stored per token, or with a projection likeliest cells of the two vocabularies"
    )
    uri: Uri | None = Field(
        None, description="scores of another run, made of the same rows", examples=["s3://bucket/run/scores/llama3b"]
    )

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        if self.uri is not None and "top_k" in self.model_fields_set:
            yield "uri: stored scores are taken as they are; top_k only applies to those that are computed"


class TeacherSpec(Section):
    """One teacher. Order in the spec fixes its index (teacher_0, teacher_1, ...)."""

    id: str = Field(
        pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$",
        max_length=63,
        description="names the teacher in tasks, metrics and errors",
        examples=["qwen"],
    )
    model: Uri = Field(
        description="hub id, local folder, fsspec URI or a .gguf file", examples=["Qwen/Qwen3-4B", "/models/teacher.gguf"]
    )
    tokenizer: Uri | None = Field(None, description="where its tokenizer lies; default: with the model")
    projection: ProjectionSpec | None = Field(
        None, description="{}: build W; absent or null: the student's own vocabulary", examples=[{}, {"learnable": True}]
    )
    weight: NonNegativeFloat = Field(1.0, description="fixed weight: aggregation sum without weight_metric, averaged_logits")
    mode: Mode | None = Field(None, description="this teacher's loss mode (aggregation sum only); default: loss.mode")
    transport: Literal["hidden", "logits", "topk"] = Field(
        "hidden", description="what the teacher process hands over; topk: same-vocabulary teachers only"
    )
    top_k: PositiveInt | None = Field(None, description="logits per position handed over by transport topk", examples=[64])
    residency: Literal["auto", "resident", "offload"] = Field(
        "auto", description="whether its weights stay on the GPU between steps"
    )
    precision: Literal["auto", "bf16", "fp8"] = Field(
        "auto",
        description="number format of its weights and products; auto: as training.precision; fp8: the layers' products in 8 bits",
    )
    domains: Strings | None = Field(
        None, min_length=1, description="domains of data.train that it teaches; default: all", examples=[["code", "maths"]]
    )
    lead: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        0.1,
        description="it is heard on a domain as long as it needs fewer bits per byte of the domain's validation text than the student, by at "
        "least this share; null: to the end",
    )
    scores: ScoresSpec | None = Field(
        None,
        description="{}: run the teacher once over the rows, before training; with a projection for partition_kl only",
        examples=[{}],
    )

    @property
    def cross_tokenizer(self) -> bool:
        """Whether the teacher's vocabulary differs from the student's (it has a projection)."""
        return self.projection is not None

    @property
    def computes_scores(self) -> bool:
        """Whether the run scores this teacher: it has scores, and not those of another run."""
        return self.scores is not None and self.scores.uri is None

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        if self.id in ("step", "data", "teachers"):
            yield f"id: {self.id} is taken: the training log has a seconds_{self.id} of its own"
        if self.transport == "topk" and self.cross_tokenizer:
            yield "transport: topk needs a teacher with the student's vocabulary, and this one has a projection"
        if (self.transport == "topk") != (self.top_k is not None):
            yield "top_k: goes with transport: topk, each needs the other"
        if self.scores is not None and self.projection is not None and self.projection.learnable:
            yield "scores: projection.learnable needs the running teacher"
        if self.scores is not None and self.transport != "hidden":
            yield f"scores: no process hands anything over, so that transport: {self.transport} means nothing"
        if self.scores is not None and self.precision != "auto":
            yield f"scores: no process runs in the training, so that precision: {self.precision} means nothing"
        if self.scores is not None and self.residency != "auto":
            yield f"scores: no process runs in the training, so that residency: {self.residency} means nothing"
        if self.mode is not None and not self.cross_tokenizer:
            yield "mode: only means something for a teacher with a projection"
