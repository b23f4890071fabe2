"""Section `student`: the model that learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from xtoken_core.spec.section import Section, Strings, Uri

Layer = Annotated[int, Field(ge=0, lt=10_000)]


class LoraSpec(Section):
    """Low-rank adapters in place of all weights (LoRA, arXiv 2106.09685)."""

    rank: Annotated[int, Field(gt=0, le=4096)] = Field(16, description="rank of each adapter")
    alpha: Annotated[int, Field(gt=0, le=65536)] = Field(32, description="an adapter counts alpha / rank times")
    targets: Strings | None = Field(
        None,
        description="names of the layers that get one; default: every linear layer but the lm_head",
        examples=[["q_proj", "v_proj"]],
    )

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        if self.targets is not None and "lm_head" in self.targets:
            yield "targets: lm_head stays as it is: the losses read its weights"


class StudentSpec(Section):
    """The model that learns."""

    model: Uri = Field(
        description="hub id, local folder, fsspec URI (s3://...) or a .gguf file",
        examples=["meta-llama/Llama-3.2-1B", "s3://bucket/models/student"],
    )
    tokenizer: Uri | None = Field(None, description="where its tokenizer lies; default: with the model")
    keep_layers: (
        Annotated[int, Field(gt=0, le=10_000)] | Annotated[tuple[Layer, ...], Field(strict=False, min_length=1)] | None
    ) = Field(
        None,
        description="depth pruning before distillation: layer indices, or a count spread evenly; null keeps all",
        examples=[8, [0, 1, 2, 14, 15]],
    )

    lora: LoraSpec | None = Field(None, description="{}: train adapters; absent or null: all weights")

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        if isinstance(self.keep_layers, tuple) and list(self.keep_layers) != sorted(set(self.keep_layers)):
            yield "keep_layers: layer indices must ascend, each once"
