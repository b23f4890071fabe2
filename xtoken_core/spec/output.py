"""Section `output`: where the finished run is published."""

from __future__ import annotations

from pydantic import Field

from xtoken_core.spec.section import Section


class OutputSpec(Section):
    """Where the finished run is published."""

    uri: str = Field(min_length=1, description="folder or fsspec URI; a finished run appears there whole or not at all")
