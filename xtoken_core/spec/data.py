"""Section `data`: documents, and how they become rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from xtoken_core.spec.section import LIST_OF_ONE, PositiveFloat, PositiveInt, Section, Uri, Uris


class TrainSource(Section):
    """One part of the training data."""

    uri: Uri = Field(description="file, folder or glob (.txt, .jsonl, .parquet), or hub data set (hf://OWNER/NAME:SPLIT)")
    weight: PositiveFloat | None = Field(
        None,
        description="share of the rows drawn from it, against the other parts' weights; null for all: each row once an epoch",
    )
    domain: str | None = Field(None, min_length=1, description="name of the part, which a teacher's `domains` can ask for")


Part = Annotated[
    Annotated[Uri, Tag("uri")] | Annotated[TrainSource, Tag("part")],
    Discriminator(lambda value: "uri" if isinstance(value, str) else "part"),
]
"""A part of the training data; a bare URI is one without weight and domain."""


class DataSpec(Section):
    """Documents and how they become rows."""

    train: Annotated[tuple[Part, ...], Field(strict=False, min_length=1, max_length=10_000), LIST_OF_ONE] = Field(
        description="parts of the training data: files, folders, globs or hub data sets, each with a weight if it needs one",
        examples=[["s3://bucket/text/*.jsonl", "more/"]],
    )
    validation: Uris = Field((), description="held-out documents, named as in train; they choose the best checkpoint")
    format: Literal["auto", "text", "messages"] = Field(
        "auto",
        description="what each record is: text, or a chat that goes through the models' chat templates; auto: what it looks like",
    )
    text_key: str = Field("text", description="column of the text in .jsonl and .parquet")
    messages_key: str = Field("messages", description="column of the chat in .jsonl and .parquet")
    assistant_only: bool = Field(True, description="in chats, KD and CE only on assistant turns")
    eos: bool = Field(True, description="end every text with an EOS, which is learned; false: for pieces of longer texts")
    max_length: Annotated[int, Field(ge=8, le=2**20)] = Field(2048, description="tokens of a row, on every side")
    max_rows: PositiveInt | None = Field(None, description="use only the first rows of the training data")
    packing: bool = Field(False, description="several documents a row, attention kept within each")
    shards: Annotated[int, Field(gt=0, le=1000)] = Field(
        1, description="parallel prepare tasks, each over its share of the documents"
    )

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        for field in {"auto": (), "text": ("messages_key", "assistant_only"), "messages": ("text_key", "eos")}[self.format]:
            if self.changed(field):
                yield f"{field}: not used with format: {self.format}"
        weights = [source.weight is not None for source in self.parts]
        if any(weights) and not all(weights):
            yield f"train.{weights.index(False)}.weight: missing, and other parts have one"
        if self.weighted and self.max_rows is not None:
            yield "max_rows: the first rows would be of the first part of data.train only, whatever the weights"

    @property
    def parts(self) -> tuple[TrainSource, ...]:
        """The parts of the training data, in the spec's order."""
        return tuple(TrainSource(uri=part) if isinstance(part, str) else part for part in self.train)

    @property
    def train_uris(self) -> tuple[str, ...]:
        """Where the training data lie, in the spec's order."""
        return tuple(part.uri for part in self.parts)

    @property
    def expected_domains(self) -> tuple[str, ...]:
        """The domains of which there must be rows: all, unless only the first rows are used."""
        return () if self.max_rows is not None else tuple(part.domain for part in self.parts if part.domain)

    @property
    def weighted(self) -> bool:
        """Whether rows are drawn by the parts' weights; otherwise each comes once an epoch."""
        return self.parts[0].weight is not None
