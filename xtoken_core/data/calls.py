"""Arguments of tool calls, which people keep as objects or as JSON of them, and templates want as one or the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def with_object_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as objects, where they are JSON of one or, as OpenAI has it of none, an empty text."""
    return _with_arguments(message, _read)


def with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as JSON."""
    return _with_arguments(message, lambda value: json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value)


def _read(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict) else value


def _with_arguments(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    changed = []
    for call in calls:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            call = call | {"function": _changed(call["function"], change)}
        elif isinstance(call, dict):
            call = _changed(call, change)
        changed.append(call)
    return message | {"tool_calls": changed}


def _changed(function: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return function | {"arguments": change(function["arguments"])} if "arguments" in function else function
