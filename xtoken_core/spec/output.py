"""Section `output`: where the finished run is published."""

from __future__ import annotations

from pydantic import Field

from xtoken_core.spec.section import Section, Uri


class OutputSpec(Section):
    """Where the finished run is published."""

    uri: Uri = Field(
        description="folder or fsspec URI; a finished run appears there whole or not at all",
        examples=["s3://bucket/runs/llama-1b"],
    )
    replace: bool = Field(
        False, description="publish in place of whatever folder lies at uri; default: only of an earlier run of the same name"
    )
