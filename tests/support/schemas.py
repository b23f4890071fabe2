"""Published schemas, applied strictly: no field that they do not know passes."""

import functools
import json
from pathlib import Path
from typing import Any

import celpy
import jsonschema

FOLDER = Path(__file__).parent / "schemas"


@functools.cache
def published(name: str) -> dict[str, Any]:
    """A schema file, every object in it closed to unknown fields."""
    return _closed(json.loads((FOLDER / f"{name}.json").read_text()))


def check_resource(resource: dict[str, Any], name: str) -> None:
    """Raises jsonschema.ValidationError unless `resource`, newly made, is one of the CRD in file `name`, by its CEL rules as well."""
    crd = published(name)
    assert (resource["apiVersion"], resource["kind"]) == (f"{crd['group']}/{crd['version']}", crd["kind"])
    jsonschema.Draft7Validator(crd["schema"]).validate(resource)
    assert check_rules(crd["schema"], resource), f"{name}: no rule applies"


def check_rules(schema: dict[str, Any], value: Any, path: str = "") -> int:
    """Evaluates every CEL rule of the schema on the part of `value` that it is about, and returns how many there were.

    Raises jsonschema.ValidationError for one that does not hold. Rules of changes (`oldSelf`) say nothing about what is new.
    """
    rules = [rule for rule in schema.get("x-kubernetes-validations", []) if "oldSelf" not in rule["rule"]]
    for rule in rules:
        if not _program(rule["rule"]).evaluate({"self": celpy.json_to_cel(value)}):
            raise jsonschema.ValidationError(f"{path or 'the resource'}: {rule['message']}")
    parts = []
    if isinstance(value, dict):
        schemas = {name: schema.get("properties", {}).get(name) or schema.get("additionalProperties") or {} for name in value}
        parts = [(schemas[name], part, f"{path}.{name}") for name, part in value.items() if isinstance(schemas[name], dict)]
    elif isinstance(value, list):
        parts = [(schema.get("items", {}), part, f"{path}[{index}]") for index, part in enumerate(value)]
    return len(rules) + sum(check_rules(*part) for part in parts)


@functools.cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def check_message(message: Any, definition: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError unless `message` is as a definition of KFP's API says."""
    api = published("kfp_v2beta1.swagger")
    jsonschema.Draft4Validator(definition | {"definitions": api["definitions"]}).validate(message)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if isinstance(schema.get("properties"), dict) and schema.get("type", "object") == "object" and not open_ended:
        closed.setdefault("additionalProperties", False)
        for field in ("apiVersion", "kind", "metadata"):  # of the resource itself: Kubernetes checks these
            if {"apiVersion", "kind"} <= schema["properties"].keys():
                closed["properties"].setdefault(field, {})
    if schema.get("type") == "object" and schema["properties"].keys() == set() if "properties" in schema else False:
        closed.pop("additionalProperties", None)
    return closed
