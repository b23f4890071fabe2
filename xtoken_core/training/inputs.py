"""What the steps before training have made for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec


@dataclass(frozen=True)
class TrainingInputs:
    """Rows, and what is known of each teacher before training."""

    rows: tuple[str | Path, ...]
    """Folders or URIs of prepared rows, one per shard, each with `train`; the first with `validation` if the spec has such data."""
    modes: Mapping[str, str] = field(default_factory=dict)
    """Loss mode of each cross-tokenizer teacher by id, where neither teacher nor loss fix it."""
    projections: Mapping[str, str | Path] = field(default_factory=dict)
    """File of W of each cross-tokenizer teacher by id."""
    scores: Mapping[str, tuple[str | Path, ...]] = field(default_factory=dict)
    """Folders or URIs of the scores of each teacher that has some, by id, one per shard of rows."""


def by_teacher(spec: DistillationSpec, scores: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Folders of scores by teacher id: of each teacher whose scores this run computes, one per shard of rows, in the spec's order.

    Raises InputError for another number of folders.
    """
    scored = [t.id for t in spec.teachers if t.computes_scores]
    shards = spec.data.shards
    if len(scores) != len(scored) * shards:
        raise InputError(f"scores: {len(scores)} folders were given for {len(scored)} teachers and {shards} shards of rows")
    return {teacher: tuple(scores[n * shards : (n + 1) * shards]) for n, teacher in enumerate(scored)}
