"""The text of a spec: YAML 1.2 (or JSON) and `dotted.key=value` overrides to plain data, within bounds of size and depth."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from xtoken_core.errors import InputError

MAX_CHARACTERS = 2**18
"""Of a spec's text, and of what it holds once its aliases are written out."""

MAX_KEY = 200
"""Characters of an override's dotted key."""

_NODE = 16
"""Characters that a value, list or mapping counts for at least, since each costs time."""

MAX_DEPTH = 20
"""Mappings and lists within each other."""

_NAMED_TEXT = "tag:yaml.org,2002:str"


def parse_text(text: str, source: str) -> Any:
    """Parses JSON, or YAML 1.2 without tags and duplicate keys. Raises InputError, which `source` begins.

    Nothing is expanded before its size and depth are known. No two parts of the result are one object.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{source}: {len(text)} characters are too many, at most {MAX_CHARACTERS}")
    if text.lstrip().startswith("{"):  # the form in which steps hand specs on: read without a YAML library
        try:
            return _plain(json.loads(text, object_pairs_hook=_once), source)
        except (ValueError, RecursionError) as e:
            if isinstance(e, InputError):
                raise
    return _plain(_load_yaml(text, source), source)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one `dotted.key=value` in place. List items go by index, teachers also by id; the value is YAML. Raises InputError."""
    dotted, equals, raw = override.partition("=")
    if len(dotted) > MAX_KEY or not dotted.isprintable():
        raise InputError(f"--set {ascii(override[:80])}: expected dotted.key=value")
    *parents, last = dotted.split(".")
    if not equals or not all((*parents, last)) or len(parents) > MAX_DEPTH:
        raise InputError(f"--set {override[:80]}: expected dotted.key=value")
    value, node = parse_text(raw, f"--set {dotted}"), data
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys. Raises ValueError: the YAML loader then says it with the line."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("duplicate key")
    return found


def _load_yaml(text: str, source: str) -> Any:
    from ruamel.yaml import YAML, SafeConstructor, YAMLError  # an image that trains may be without it

    yaml = YAML(typ="safe", pure=True)
    dates_as_text = {"tag:yaml.org,2002:timestamp": SafeConstructor.construct_yaml_str}  # YAML 1.2 has no dates
    yaml.constructor.yaml_constructors = yaml.constructor.yaml_constructors | dates_as_text
    try:
        _check_events(YAML(typ="safe", pure=True).parse(text), source)
        return yaml.load(text)
    except YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = str(getattr(e, "problem", None) or "not YAML")
        raise InputError(f"{source}:{line} {problem.removeprefix('found ').split(' with value ')[0]}") from None
    except ValueError as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{source}: a number has too many digits, or none") from None


def _check_events(events: Iterable[Any], source: str) -> None:
    """Follows the parser, which expands nothing. Raises InputError for too much depth, for aliases that stand for too much, for tags."""
    open_anchors: list[tuple[str | None, int]] = []
    sizes: dict[str, int] = {}
    size = 0
    for event in events:
        kind, line = type(event).__name__, f"{source}: line {event.start_mark.line + 1}:"
        if kind == "DocumentStartEvent" and (event.version or event.tags):
            raise InputError(f"{line} directives (%YAML, %TAG) are not taken")
        if getattr(event, "ctag", None) is not None and str(event.ctag) not in ("!", _NAMED_TEXT):
            raise InputError(f"{line} tags ({str(event.ctag)[:40]}) are not taken")
        if kind == "AliasEvent":
            if event.anchor not in sizes:
                raise InputError(f"{line} alias *{event.anchor[:40]} stands for nothing that is complete before it")
            size += sizes[event.anchor]
        elif kind == "ScalarEvent":
            size += _NODE + len(event.value)
            if event.anchor:
                sizes[event.anchor] = _NODE + len(event.value)
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            open_anchors.append((event.anchor, size))
            size += _NODE
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            anchor, before = open_anchors.pop()
            if anchor:
                sizes[anchor] = size - before
        if len(open_anchors) > MAX_DEPTH:
            raise InputError(f"{line} nested more than {MAX_DEPTH} deep")
        if size > MAX_CHARACTERS:
            raise InputError(f"{line} the spec is too large, its aliases written out")


def _plain(value: Any, source: str, depth: int = 0) -> Any:
    """A copy in which nothing is shared. Raises InputError for depth, for keys that are not text and for characters no field can hold."""
    if depth > MAX_DEPTH:
        raise InputError(f"{source}: nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{source}: key {ascii(key)[:80]} is not text")
        return {_plain(key, source): _plain(item, source, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, source, depth + 1) for item in value]
    if isinstance(value, str) and any(c < " " or c == "\x7f" or "\ud800" <= c <= "\udfff" for c in value):
        raise InputError(f"{source}: {ascii(value)[:80]} holds a line break, a control character or half a character")
    return value
