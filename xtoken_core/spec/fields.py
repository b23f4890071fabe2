"""Every field of the spec as data: what `xtoken explain` prints and the reference of the documentation shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {}",
    "maxItems": "at most {}",
    "pattern": "matches {}",
}


@dataclass(frozen=True)
class SpecField:
    """One field of the spec, or one of its sections."""

    path: str
    """Dotted, as `--set` takes it; `[]` stands for an index: `teachers[].weight`."""
    kind: str
    """The values it takes, in words."""
    default: str
    """As YAML writes it; `required` where there is none."""
    description: str
    examples: tuple[str, ...] = ()
    """As YAML writes them."""
    section: bool = False
    """Whether it holds fields of its own, which follow it."""


def spec_fields(model: type[BaseModel]) -> list[SpecField]:
    """All fields, those of a section behind it, in the spec's order."""
    schema = model.model_json_schema()
    return list(_walk(schema, schema["$defs"], ""))


def _walk(schema: dict[str, Any], known: dict[str, Any], prefix: str) -> Iterator[SpecField]:
    for name, field in schema["properties"].items():
        below = _section_of(field, known)
        path = f"{prefix}{name}" + ("[]" if below and "items" in str(field) else "")
        yield SpecField(
            path=path,
            kind=_kind(field, known),
            default="required" if name in schema.get("required", ()) else _default(field, below),
            description=field.get("description") or (below or {}).get("description", ""),
            examples=tuple(json.dumps(example, ensure_ascii=False) for example in field.get("examples", ())),
            section=below is not None,
        )
        if below is not None:
            yield from _walk(below, known, f"{path}.")


def _section_of(field: dict[str, Any], known: dict[str, Any]) -> dict[str, Any] | None:
    """The section behind a field: its own, of its items, or of the first choice that has one."""
    if "$ref" in field:
        found = known[field["$ref"].rsplit("/", 1)[1]]
        return found if "properties" in found else None
    inner = [
        *field.get("anyOf", ()),
        *field.get("oneOf", ()),
        *field.get("allOf", ()),
        *([field["items"]] if "items" in field else ()),
    ]
    return next((section for part in inner if (section := _section_of(part, known))), None)


def _default(field: dict[str, Any], below: dict[str, Any] | None) -> str:
    """`{}` for a section that is there anyhow: its fields have their own defaults."""
    value = field.get("default")
    return "{}" if below and isinstance(value, dict) else json.dumps(value, ensure_ascii=False)


def _kind(field: dict[str, Any], known: dict[str, Any]) -> str:
    if "$ref" in field:
        return _kind(known[field["$ref"].rsplit("/", 1)[1]], known)
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(part, known) for part in choices))
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    bounds = ", ".join(words.format(field[name]) for name, words in _BOUNDS.items() if name in field)
    kind = {"object": "mapping", "boolean": "true | false", "string": "text"}.get(field.get("type", ""), field.get("type", "any"))
    if kind == "array":
        kind = f"list of {_kind(field['items'], known)}" if "items" in field else "list"
    return f"{kind}, {bounds}" if bounds else kind
