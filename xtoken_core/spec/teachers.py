"""Section `teachers`: the models that are learned from, each with its projection."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from xtoken_core.spec.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section

Mode = Literal["p_kl", "h_kl", "gold"]


class ProjectionSpec(Section):
    """How the projection matrix W (student vocabulary x teacher vocabulary) of one teacher is made."""

    uri: str | None = Field(None, description="reuse a stored W (.safetensors, or NeMo-RL's .pt) in place of building one")
    top_k: PositiveInt = Field(4, description="entries kept per student token")
    reverse_pass: bool = Field(False, description="also map the teacher's tokens back through the student's tokenizer")
    learnable: bool = Field(False, description="train the weights of W's nonzeros with the student")
    learning_rate: PositiveFloat = Field(1e-2, description="of W's weights, when learnable")

    @model_validator(mode="after")
    def _stored_or_built(self) -> Self:
        if self.uri is not None and {"top_k", "reverse_pass"} & self.model_fields_set:
            raise ValueError("uri: a stored projection is taken as it is; top_k and reverse_pass only apply to one that is built")
        if not self.learnable and "learning_rate" in self.model_fields_set:
            raise ValueError("learning_rate: only used with learnable: true")
        return self


class TeacherSpec(Section):
    """One teacher. Order in the spec fixes its index (teacher_0, teacher_1, ...)."""

    id: str = Field(pattern=r"^[a-z0-9-]+$", description="names the teacher in tasks, metrics and errors")
    model: str = Field(min_length=1, description="hub id, local folder, fsspec URI or a .gguf file")
    tokenizer: str | None = Field(None, description="where its tokenizer lies; default: with the model")
    projection: ProjectionSpec | None = Field(None, description="{}: build W; absent or null: the student's own vocabulary")
    weight: NonNegativeFloat = Field(1.0, description="fixed weight: aggregation sum without weight_metric, averaged_logits")
    mode: Mode | None = Field(None, description="this teacher's loss mode (aggregation sum only); default: loss.mode")
    transport: Literal["hidden", "logits", "topk"] = Field("hidden", description="what the teacher process hands over")
    top_k: PositiveInt | None = Field(None, description="logits per position handed over by transport topk")
    residency: Literal["auto", "resident", "offload"] = Field(
        "auto", description="whether its weights stay on the GPU between steps"
    )

    @property
    def cross_tokenizer(self) -> bool:
        """Whether the teacher's vocabulary differs from the student's (it has a projection)."""
        return self.projection is not None

    @model_validator(mode="after")
    def _id_is_free(self) -> Self:
        if self.id in ("step", "data", "teachers"):
            raise ValueError(f"id: {self.id} is taken: the training log has a seconds_{self.id} of its own")
        return self

    @model_validator(mode="after")
    def _transport_fits(self) -> Self:
        if self.transport == "topk" and self.cross_tokenizer:
            raise ValueError("transport: topk needs a teacher with the student's vocabulary, and this one has a projection")
        if (self.transport == "topk") != (self.top_k is not None):
            raise ValueError("top_k: goes with transport: topk, each needs the other")
        if self.mode is not None and not self.cross_tokenizer:
            raise ValueError("mode: only means something for a teacher with a projection")
        return self
