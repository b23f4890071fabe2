"""Section `evaluation`: what the student, its former self and the teachers are measured on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from xtoken_core.spec.section import NonNegativeInt, PositiveInt, Section, Strings, Uris


class EvaluationSpec(Section):
    """What the student, its former self and the teachers are measured on."""

    bits_per_byte: bool = Field(True, description="measure bits per byte, where there is held-out text")
    texts: Uris = Field((), description="held-out documents for bits per byte; default: data.validation")
    window: Annotated[int, Field(ge=8, le=2**20)] | None = Field(None, description="context in tokens; default: data.max_length")
    tasks: Strings = Field(
        (), description="lm-evaluation-harness tasks, suites or task folders", examples=[["gsm_symbolic", "hellaswag"]]
    )
    num_fewshot: NonNegativeInt | None = Field(None, description="shots of the tasks; default: each task's own")
    limit: PositiveInt | None = Field(None, description="examples per task; default: all")
    ce_baseline: bool = Field(False, description="also train a twin on cross-entropy alone, same rows and steps")
