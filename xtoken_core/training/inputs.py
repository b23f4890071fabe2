"""What the steps before training have made for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TrainingInputs:
    """Rows, and what is known of each teacher before training."""

    rows: tuple[str | Path, ...]
    """Folders or URIs of prepared rows, one per shard, each with `train`; the first with `validation` if the spec has such data."""
    modes: Mapping[str, str] = field(default_factory=dict)
    """Loss mode of each cross-tokenizer teacher by id, where neither teacher nor loss fix it."""
    projections: Mapping[str, str | Path] = field(default_factory=dict)
    """File of W of each cross-tokenizer teacher by id."""
