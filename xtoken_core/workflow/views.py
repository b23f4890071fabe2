"""The part of the spec that each step reads."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from xtoken_core.spec import DistillationSpec

_TOKENIZERS = {"student": ("model", "tokenizer"), "teachers": ("id", "model", "tokenizer", "projection")}

_OF_TOKENIZERS = {
    "overlap": ("student", "teachers"),
    "projections": ("student", "teachers"),
    "prepare": ("student", "teachers"),
    "score": ("student",),
}
"""Steps that load of these sections' models the tokenizers only: two models that share one are the same to them."""

_WHETHER_PROJECTED = ("overlap", "prepare", "score", "evaluate_student", "evaluate_teachers", "baseline")
"""Steps that read of W whether there is one, not which."""

_TEXTS = ("validation", "format", "text_key", "messages_key", "assistant_only", "max_length")

_DIVERGENCE = (
    "mode",
    "chunk_distribution",
    "topk_scope",
    "vocab_topk",
    "uncommon_topk",
    "temperature",
    "reverse_kl",
    "exact_match_only",
)

_MEASURES = ("bits_per_byte", "texts", "window", "tasks", "num_fewshot", "limit")

READS: dict[str, dict[str, tuple[str, ...]]] = {
    "overlap": {**_TOKENIZERS, "teachers": (*_TOKENIZERS["teachers"], "mode"), "loss": ("mode",)},
    "projections": _TOKENIZERS,
    "prepare": {**_TOKENIZERS, "data": ("*",)},
    "score": {
        **_TOKENIZERS,
        "teachers": (*_TOKENIZERS["teachers"], "scores", "domains"),
        "data": ("train",),
        "loss": ("temperature",),
        "training": ("attention", "precision"),
    },
    "distill": {
        "student": ("*",),
        "teachers": ("*",),
        "loss": ("*",),
        "data": ("*",),
        "training": ("*",),
        "resources": ("nodes", "gpus_per_node"),
    },
    "baseline": {**_TOKENIZERS, "student": ("*",), "data": ("*",), "training": ("*",), "resources": ("gpus_per_node",)},
    "trial": {
        **dict.fromkeys(("student", "teachers", "loss", "data", "training"), ("*",)),
        "evaluation": ("bits_per_byte", "texts", "window"),
        "resources": ("gpus_per_node",),
    },
    "evaluate_student": {
        **_TOKENIZERS,
        "student": ("*",),
        "loss": _DIVERGENCE,
        "data": _TEXTS,
        "evaluation": _MEASURES,
        "training": ("attention", "precision"),
    },
    "evaluate_teachers": {
        "teachers": _TOKENIZERS["teachers"],
        "data": _TEXTS,
        "evaluation": _MEASURES,
        "training": ("attention", "precision"),
    },
}
"""Fields of the spec that each kind of step reads; `*`: all."""


class View(DistillationSpec):
    """The spec as a step is given it: what the step reads, the rest reset."""

    content: str = Field("", description="Digest of the code and of what the step reads beside the spec: part of its cache key.")
    shared_rows: int | None = Field(
        None,
        description="Ids that the student and every teacher of its vocabulary have a row for, to a step that is not told them all.",
    )


def view(spec: DistillationSpec, step: str, content: str = "") -> View:
    """The view of one kind of step."""
    full = spec.model_dump(mode="json", exclude_defaults=True)
    kept: dict[str, Any] = {}
    for section, fields in READS[step].items():
        if section == "teachers":
            kept["teachers"] = [_teacher(teacher, step) for teacher in _concerned(full["teachers"], step)]
        elif section in full:
            kept[section] = _pick(full[section], fields)
    if "student" in _OF_TOKENIZERS.get(step, ()):
        kept["student"] = _tokenizer(kept["student"])
    kept = {"name": "view", "student": {"model": "unused"}, "output": {"uri": "unused"}, "content": content} | kept
    kept["data"] = {"train": ["unused"]} | kept.get("data", {})
    return View.from_text(json.dumps(kept), source=f"the {step} step's part of the spec")


def _concerned(teachers: list[dict[str, Any]], step: str) -> list[dict[str, Any]]:
    """The teachers that a step is told of: scoring of those whose scores are computed, where there are any."""
    return [t for t in teachers if step == "score" and "scores" in t and not t["scores"].get("uri")] or teachers


def _teacher(section: dict[str, Any], step: str) -> dict[str, Any]:
    kept = _pick(section, READS[step]["teachers"])
    if kept.get("projection") and step in _WHETHER_PROJECTED:
        kept["projection"] = {}
    return _tokenizer(kept) if "teachers" in _OF_TOKENIZERS.get(step, ()) else kept


def _tokenizer(section: dict[str, Any]) -> dict[str, Any]:
    """A model that stands for its tokenizer: where that lies."""
    other = section.pop("tokenizer", None)
    return section | ({"model": other} if other else {})


def _pick(section: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    return dict(section) if fields == ("*",) else {k: v for k, v in section.items() if k in fields}
