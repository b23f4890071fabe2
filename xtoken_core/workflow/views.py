"""The part of the spec that each step reads."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from xtoken_core.spec import DistillationSpec

_TOKENIZERS = {"student": ("model", "tokenizer"), "teachers": ("id", "model", "tokenizer", "projection")}

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
    "evaluate_teachers": {**_TOKENIZERS, "data": _TEXTS, "evaluation": _MEASURES, "training": ("attention", "precision")},
}
"""Fields of the spec that each kind of step reads; `*`: all."""


class View(DistillationSpec):
    """The spec as a step is given it: what the step reads, the rest reset."""

    content: str = Field("", description="Digest of the code and of what the step reads beside the spec: part of its cache key.")


def view(spec: DistillationSpec, step: str, content: str = "") -> View:
    """The view of one kind of step."""
    full = spec.model_dump(mode="json", exclude_defaults=True)
    kept: dict[str, Any] = {}
    for section, fields in READS[step].items():
        if section == "teachers":
            kept["teachers"] = [_pick(t, fields) for t in full["teachers"]]
            if step in (
                "overlap",
                "prepare",
                "score",
                "evaluate_student",
                "evaluate_teachers",
                "baseline",
            ):  # whether there is one, not which
                kept["teachers"] = [t | {"projection": {}} if t.get("projection") else t for t in kept["teachers"]]
        elif section in full:
            kept[section] = _pick(full[section], fields)
    kept = {"name": "view", "output": {"uri": "unused"}, "content": content} | kept
    kept["data"] = {"train": ["unused"]} | kept.get("data", {})
    return View.from_text(json.dumps(kept), source=f"the {step} step's part of the spec")


def _pick(section: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    return dict(section) if fields == ("*",) else {k: v for k, v in section.items() if k in fields}
