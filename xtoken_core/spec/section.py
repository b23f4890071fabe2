"""What the sections of a spec share: their behaviour and the types of their fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from xtoken_core.uris import has_keys

MAX_STEPS = 10**7
"""Upper bound of steps, rows and whatever is counted like them: beyond it lies a slip of the keyboard."""


def _without_keys(uri: str) -> str:
    if has_keys(uri):
        raise PydanticCustomError("keys", "carries a user name, key or signature; credentials come from the environment")
    return uri


LIST_OF_ONE = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
"""Takes one text where a list is meant."""

PositiveInt = Annotated[int, Field(gt=0, le=MAX_STEPS)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_STEPS)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Uri = Annotated[str, Field(min_length=1), AfterValidator(_without_keys)]
"""A hub id, path or URI. Keys in it are refused: they would end in logs, reports and compiled pipelines."""
Strings = Annotated[tuple[str, ...], Field(strict=False, max_length=10_000), LIST_OF_ONE]
"""A list of text, or one text in place of a list of one."""
Uris = Annotated[tuple[Uri, ...], Field(strict=False, max_length=10_000), LIST_OF_ONE]
"""A list of URIs, or one URI in place of a list of one."""
Quantity = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
"""An amount as Kubernetes writes it. YAML takes some of them for numbers."""


class Section(BaseModel):
    """Settings shared by every section: immutable, no unknown keys, no silent coercion, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, str_max_length=4096)

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """Takes `1e3` and `8.0`, which YAML reads as floats, for whole numbers; fields of floats take those as well."""
        return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together, each as `field: why`."""
        yield from ()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if found := tuple(self.contradictions()):
            raise PydanticCustomError("contradictions", "{text}", {"text": "; ".join(found), "found": found})
        return self

    def changed(self, field: str) -> bool:
        """Whether a field was given, and is not its default."""
        return field in self.model_fields_set and getattr(self, field) != type(self).model_fields[field].default
