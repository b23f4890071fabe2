"""What is wrong with a spec, in lines: the field, why, what was given, and what may have been meant."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from xtoken_core.spec.fields import spec_fields
from xtoken_core.uris import without_keys

_SILENT = {"extra_forbidden", "missing", "keys"}
"""Complaints that do not repeat the value: it says nothing, or is secret."""


_PLAIN = {"a-z0-9", "a-z0-9-"}
"""Sets of characters in the patterns of plain names."""

MOST = 50
"""Lines of complaint; who has more has one mistake many times."""


def complaints(error: ValidationError, data: Any, model: type[BaseModel]) -> list[str]:
    """Every complaint of pydantic about `data`, each as one line that begins with its dotted field, in the spec's order."""
    by_path: dict[tuple[int | str, ...], list[Any]] = {}
    for e in error.errors(include_url=False):
        by_path.setdefault(_path(e["loc"], data, e["type"]), []).append(e)
    sections = {path[:depth] for path in by_path for depth in range(len(path))}
    lines: list[str] = []
    for path, errors in by_path.items():
        if path in sections:  # others say what is wrong within
            errors = [e for e in errors if e["loc"] == path and e["type"] != "too_short"]
        lines += _lines(path, errors, model)
        if len(lines) > MOST:
            return [*lines[:MOST], f"and more: {error.error_count()} in all"]
    return lines


def _path(loc: tuple[int | str, ...], data: Any, kind: str) -> tuple[int | str, ...]:
    """The field's place in `data`: pydantic's, without the branches of its unions, which are no keys of it. kind: of the error."""
    path: list[int | str] = []
    for place, key in enumerate(loc, 1):
        if isinstance(data, dict) and isinstance(key, str):
            if key not in data and not (kind == "missing" and place == len(loc)):
                continue
            path.append(key)
            data = data.get(key)
        elif isinstance(data, list) and isinstance(key, int):
            path.append(key)
            data = data[key] if key < len(data) else None
    return tuple(path)


def _lines(path: tuple[int | str, ...], errors: list[Any], model: type[BaseModel]) -> Iterator[str]:
    """What several errors say of one field: each contradiction for itself, the branches of a union in one line."""
    field, got = ".".join(map(str, path)), ""
    reasons: dict[str, None] = {}
    for error in errors:
        if error["type"] == "contradictions":
            yield from (f"{field}.{line}" if field else line for line in error["ctx"]["found"])
        elif error["type"] == "value_error":
            line = error["msg"].removeprefix("Value error, ")
            yield f"{field}.{line}" if field else line
        else:
            reasons[_reason(path, error, model)] = None
            if error["type"] not in _SILENT:
                got = f" (got {without_keys(json.dumps(error['input'], default=str, ensure_ascii=False))[:80]})"
    if reasons:
        yield f"{field or 'the spec'}: {', or '.join(reasons)}{got}"


def _reason(path: tuple[int | str, ...], error: Any, model: type[BaseModel]) -> str:
    if error["type"] == "missing":
        return "required"
    if error["type"] == "extra_forbidden":
        return f"no such field; {_meant(path, model)}"
    if error["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        close = difflib.get_close_matches(str(error["input"]), allowed, 1)
        return f"not one of {', '.join(allowed)}{f'; did you mean {close[0]}?' if close else ''}"
    if error["type"] == "string_pattern_mismatch" and set(re.findall(r"\[(.*?)\]", error["ctx"]["pattern"])) <= _PLAIN:
        return "takes lower-case letters and digits, with hyphens between them"
    message = re.sub(r"^(Input|Value|String|Tuple|List|Dictionary) (?=should)", "", error["msg"])
    message = re.sub(r"valid dictionary( or instance of \w+)?", "mapping", message)
    return message.replace("valid tuple", "list").replace("finite number", "number that is finite")


@cache
def _fields(model: type[BaseModel]) -> list[str]:
    return [field.path.removesuffix("[]") for field in spec_fields(model)]


def _meant(path: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The field of that section that is nearest, else one of that name elsewhere, else what the section has."""
    *section, name = ("[]" if isinstance(key, int) else key for key in path)
    prefix = ".".join(section).replace(".[]", "[]") + "." if section else ""
    known = _fields(model)
    here = [field.removeprefix(prefix) for field in known if field.startswith(prefix) and "." not in field[len(prefix) :]]
    elsewhere = [field for field in known if field.rpartition(".")[2] == name]
    close = difflib.get_close_matches(name, here, 1, 0.7) or elsewhere[:1] or difflib.get_close_matches(name, here, 1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(here)}"
