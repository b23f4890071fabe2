"""What of a spec is built into its compiled pipeline, and what follows for a run of it. Loads no library that takes long."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from xtoken_core import storage
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.subjects import groups

CHECKPOINTS = "XTOKEN_CHECKPOINTS"
"""Environment variable: where a local run keeps the checkpoints from which an interrupted training resumes."""


WIRING = 7
"""Version of what a compiled pipeline and the steps of an image agree on: raised whenever a step's inputs, outputs or calls change."""


def shape(spec: DistillationSpec) -> dict[str, Any]:
    """What of the spec is built into a compiled pipeline: its tasks, their wiring and what they get on a cluster."""
    fixed = {
        "wiring": WIRING,
        "teachers": [t.id for t in spec.teachers],
        **{f"teachers.{t.id}.projection": "a projection" if t.cross_tokenizer else "none" for t in spec.teachers},
        "data.shards": spec.data.shards,
        "scores": [t.id for t in spec.teachers if t.computes_scores],
        "pilot": spec.pilot and spec.pilot.model_dump(mode="json"),
        "evaluation.ce_baseline": spec.evaluation.ce_baseline,
        "evaluation": groups(spec),
    }
    return fixed | {f"resources.{name}": value for name, value in spec.resources.model_dump(mode="json").items()}


def check_shape(spec: DistillationSpec, built_in: Mapping[str, Any]) -> None:
    """Raises InputError where a spec asks for another `shape` than the compiled pipeline has."""
    if (compiled := built_in.get("wiring", 1)) != WIRING:
        raise InputError(
            f"compiled pipeline: of version {compiled}, but the steps of this image are of version {WIRING}; compile and submit it "
            "with the release of the image"
        )
    for name, asked in shape(spec).items():
        if built_in.get(name) != asked:
            told, has = json.dumps(asked, ensure_ascii=False), json.dumps(built_in.get(name), ensure_ascii=False)
            raise InputError(f"{name}: {told} contradicts the compiled pipeline, which has {has} built in")


def check_ranks(spec: DistillationSpec) -> None:
    """Raises InputError unless the rows of a step divide over the GPUs that training gets on a cluster."""
    spec.training.accumulation(spec.resources.nodes * max(spec.resources.gpus_per_node, 1))


def output_lasts(spec: DistillationSpec) -> bool:
    """Whether what a pod publishes is there after it: at a URI, or on a volume of `resources.pvc`."""
    return storage.is_remote(spec.output.uri) or spec.resources.keeps(storage.normalize(spec.output.uri))
