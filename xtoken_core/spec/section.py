"""What the sections of a spec share: their behaviour and the types of their fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Quantity = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
"""An amount as Kubernetes writes it, of which YAML takes some for numbers."""


class Section(BaseModel):
    """Settings shared by every section: immutable, no unknown keys, no silent coercion, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
