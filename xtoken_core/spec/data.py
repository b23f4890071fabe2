"""Section `data`: documents, and how they become rows."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from xtoken_core.spec.section import PositiveInt, Section, Strings


class DataSpec(Section):
    """Documents and how they become rows."""

    train: Annotated[Strings, Field(min_length=1)] = Field(
        description="files, folders or globs: .txt (one document each), .jsonl, .parquet"
    )
    validation: Strings = Field((), description="same; chooses the best checkpoint")
    format: Literal["text", "messages"] = "text"
    text_key: str = Field("text", description="column of the text in .jsonl and .parquet")
    messages_key: str = Field("messages", description="column of the chat in .jsonl and .parquet, format: messages")
    assistant_only: bool = Field(True, description="format: messages: KD and CE only on assistant turns")
    max_length: Annotated[int, Field(ge=8)] = Field(2048, description="tokens of a row, on every side")
    max_rows: PositiveInt | None = Field(None, description="use only the first rows of the training data")
    packing: bool = Field(False, description="several documents a row, attention kept within each")
    shards: PositiveInt = Field(1, description="parallel prepare tasks, each over its share of the documents")

    @model_validator(mode="after")
    def _format_fits(self) -> Self:
        unused = {"text": ("messages_key", "assistant_only"), "messages": ("text_key",)}[self.format]
        for field in unused:
            if field in self.model_fields_set and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field}: not used with format: {self.format}")
        return self
