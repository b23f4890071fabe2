"""Section `data`: documents, and how they become rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from xtoken_core.spec.section import PositiveInt, Section, Uris


class DataSpec(Section):
    """Documents and how they become rows."""

    train: Annotated[Uris, Field(min_length=1)] = Field(
        description="files, folders or globs: .txt (one document each), .jsonl, .parquet",
        examples=[["s3://bucket/text/*.jsonl", "more/"]],
    )
    validation: Uris = Field((), description="same; chooses the best checkpoint")
    format: Literal["text", "messages"] = Field("text", description="messages: chats, through the models' chat templates")
    text_key: str = Field("text", description="column of the text in .jsonl and .parquet")
    messages_key: str = Field("messages", description="column of the chat in .jsonl and .parquet, format: messages")
    assistant_only: bool = Field(True, description="format: messages: KD and CE only on assistant turns")
    max_length: Annotated[int, Field(ge=8, le=2**20)] = Field(2048, description="tokens of a row, on every side")
    max_rows: PositiveInt | None = Field(None, description="use only the first rows of the training data")
    packing: bool = Field(False, description="several documents a row, attention kept within each")
    shards: Annotated[int, Field(gt=0, le=1000)] = Field(
        1, description="parallel prepare tasks, each over its share of the documents"
    )

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        for field in {"text": ("messages_key", "assistant_only"), "messages": ("text_key",)}[self.format]:
            if self.changed(field):
                yield f"{field}: not used with format: {self.format}"
