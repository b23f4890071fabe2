"""The text of a spec: YAML 1.2 and `dotted.key=value` overrides to plain data, and what pydantic says of it in one line."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from pydantic import ValidationError

from xtoken_core.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (1e-3 is a number, `on` and `no` are text) and no duplicate keys."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, rx)
        for tag, rx in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
        seen.add(key)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _construct_sequence(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)  # whole before anything can refer to it: no list holds itself


_Loader.add_constructor("tag:yaml.org,2002:seq", _construct_sequence)


def parse_yaml(text: str, source: str) -> Any:
    """What the YAML holds. Raises InputError, which `source` begins."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise InputError(f"{source}:{line} {getattr(e, 'problem', None) or 'not YAML'}") from None
    except RecursionError:
        raise InputError(f"{source}: nested too deeply") from None
    except (ValueError, LookupError, AttributeError):  # what PyYAML makes of `!!int abc`, `!!bool abc` and `!!timestamp abc`
        raise InputError(f"{source}: a value is not what its tag says, or too long a number") from None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one `dotted.key=value` in place. List items go by index, teachers also by id; the value is YAML. Raises InputError."""
    dotted, equals, raw = override.partition("=")
    if not equals or not dotted:
        raise InputError(f"--set {override}: expected dotted.key=value")
    *parents, last = dotted.split(".")
    value, node = parse_yaml(raw, f"--set {dotted}"), data
    for depth, key in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        elif isinstance(node, list):
            node = node[_list_index(node, key, f"--set {where}")]
        else:
            raise InputError(f"--set {dotted}: {'.'.join(parents[:depth])} has no fields")
    if isinstance(node, list):
        node[_list_index(node, last, f"--set {dotted}")] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise InputError(f"--set {dotted}: {'.'.join(parents)} has no fields")


def _list_index(items: list[Any], key: str, where: str) -> int:
    for index, item in enumerate(items):
        if isinstance(item, dict) and item.get("id") == key or key == str(index):
            return index
    raise InputError(f"{where}: no such item")


def first_error(error: ValidationError, data: Any) -> str:
    """The first complaint of pydantic as `dotted.field: message (got value)`."""
    first = error.errors(include_url=False)[0]
    path, node = [], data
    for key in first["loc"]:
        known = isinstance(node, dict) and (key in node or first["type"] == "missing")
        if known or (isinstance(node, list) and isinstance(key, int) and key < len(node)):
            path.append(str(key))
            node = node.get(key) if isinstance(node, dict) else node[key]
        elif not path or isinstance(node, (dict, list)):  # union branches of pydantic are no part of the field's name
            path.append(str(key))
    message = first["msg"].removeprefix("Value error, ")
    message = {"extra_forbidden": "no such field", "missing": "required"}.get(first["type"], message)
    got = (
        ""
        if first["type"] in ("extra_forbidden", "missing", "value_error")
        else f" (got {json.dumps(first['input'], default=str)[:80]})"
    )
    prefix = ".".join(path)
    joiner = "." if first["type"] == "value_error" and prefix else ": "
    return f"{prefix}{joiner if prefix else ''}{message}{got}"
