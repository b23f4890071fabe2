"""Section `student`: the model that learns."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from xtoken_core.spec.section import NonNegativeInt, PositiveInt, Section


class StudentSpec(Section):
    """The model that learns."""

    model: str = Field(min_length=1, description="hub id, local folder, fsspec URI (s3://...) or a .gguf file")
    tokenizer: str | None = Field(None, description="where its tokenizer lies; default: with the model")
    keep_layers: PositiveInt | Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="depth pruning before distillation: layer indices, or a count spread evenly; null keeps all"
    )

    @model_validator(mode="after")
    def _layers_ascend(self) -> Self:
        if isinstance(self.keep_layers, tuple) and list(self.keep_layers) != sorted(set(self.keep_layers)):
            raise ValueError("keep_layers: layer indices must ascend, each once")
        return self
