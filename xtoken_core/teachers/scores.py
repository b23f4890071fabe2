"""Scores: what a teacher said of prepared rows, stored once and read in place of the teacher.

A folder holds `part-00000.safetensors`, ... of consecutive rows. Of each of a part's N tokens, all rows one after another:

    values          float16 or float32 [N, k]  log-probabilities of the teacher's k likeliest next tokens, at temperature 1
    indices         int32 [N, k]               their ids
    log_sum         float32 [N]                log of the summed exponentials of all logits; values + log_sum are logits
    log_normaliser  float32 [N]                the same of the logits divided by the temperature of the loss
    realised        float32 [N]                log-probability of the row's own next token; 0 where there is none
    starts          int64 [rows + 1]           where each row begins

Headers hold the settings (`ScoreSettings`); parts of other settings are made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xtoken_core.errors import InputError
from xtoken_core.losses.logits import TopKLogits

FORMAT = "xtoken-scores-1"
TENSORS = ("values", "indices", "log_sum", "log_normaliser", "realised", "starts")


@dataclass(frozen=True)
class ScoreSettings:
    """What scores were made of. Scores of equal settings are the same."""

    teacher: str
    """Version of the model, by its content."""
    rows: str
    """`rows_digest` of the prepared rows."""
    top_k: int
    vocab_size: int
    """Columns of the logits: ids that the student and every teacher of its vocabulary have a row for."""
    temperature: float
    dtype: str
    """In which the teacher ran."""


def rows_digest(rows: Any) -> str:
    """Of the student's tokens in prepared rows, which is what a teacher of its vocabulary reads."""
    digest = hashlib.sha256()
    for batch in rows.select_columns(["student_ids"]).with_format("arrow").iter(1000):
        column = batch.column(0).combine_chunks()
        digest.update(np.diff(column.offsets.to_numpy()).astype("<i4").tobytes())
        digest.update(column.flatten().to_numpy().astype("<i4").tobytes())
    return digest.hexdigest()[:16]


def part_file(folder: Path, part: int) -> Path:
    """Where a part lies."""
    return folder / f"part-{part:05}.safetensors"


def write_part(path: Path, tensors: dict[str, Tensor], settings: ScoreSettings) -> None:
    """Writes a part so that it appears whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"format": FORMAT, "settings": json.dumps(asdict(settings), sort_keys=True)})
    os.replace(partial, path)


def is_part(path: Path, settings: ScoreSettings) -> bool:
    """Whether a whole part of the settings lies there."""
    try:
        with safe_open(path, "pt") as file:
            return _settings(file.metadata(), path) == settings and set(TENSORS) <= set(file.keys())
    except (OSError, SafetensorError, InputError):
        return False


class Scores:
    """The scores of one shard's rows, memory-mapped: a row is read when it is asked for."""

    def __init__(self, folder: str | Path):
        """Raises InputError for a folder without scores, or with parts that do not go together."""
        self.folder = Path(folder)
        self.parts = sorted(self.folder.glob("part-*.safetensors"))
        if not self.parts:
            raise InputError(f"{folder}: holds no scores")
        starts, found = [], []
        for path in self.parts:
            try:
                with safe_open(path, "pt") as file:
                    found.append(_settings(file.metadata(), path))
                    starts.append(file.get_tensor("starts").numpy())
            except (OSError, SafetensorError) as e:
                raise InputError(f"{path}: cannot read the scores: {str(e).splitlines()[0]}") from None
        if len(set(found)) > 1:
            raise InputError(f"{folder}: its parts were scored with different settings")
        self.settings: ScoreSettings = found[0]
        self._starts: list[np.ndarray] = starts
        self._first = np.cumsum([0, *(len(s) - 1 for s in starts)])
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a worker of the data loader maps the files itself

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """(logits [T, k] float32, ids [T, k] int32) of one row."""
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        if part not in self._open:
            self._open[part] = safe_open(self.parts[part], "pt").__enter__()
        file, starts, place = self._open[part], self._starts[part], index - int(self._first[part])
        first, last = int(starts[place]), int(starts[place + 1])
        values, indices, log_sum = (file.get_slice(name)[first:last] for name in ("values", "indices", "log_sum"))
        return values.float() + log_sum[:, None], indices


class ScoredTeacher:
    """A teacher of which only scores are there: what it would hand over of a micro-batch."""

    def __init__(self, shards: Sequence[Scores]):
        """shards: of the prepared rows, in their order."""
        self.shards = tuple(shards)
        self.settings = self.shards[0].settings

    def __call__(self, rows: Sequence[dict[str, Any]]) -> TopKLogits:
        """The logits of rows that know their `shard` and `row`, padded on the right."""
        found = [self.shards[int(row["shard"])].row(int(row["row"])) for row in rows]
        k, width = self.settings.top_k, max(len(values) for values, _ in found)
        values = torch.zeros(len(rows), width, k)
        indices = torch.arange(k, dtype=torch.int32).expand(len(rows), width, k).clone()
        for b, (row_values, row_indices) in enumerate(found):
            values[b, : len(row_values)], indices[b, : len(row_values)] = row_values, row_indices
        return TopKLogits(values, indices, self.settings.vocab_size)


def _settings(header: dict[str, str] | None, path: Path) -> ScoreSettings:
    if header is None or header.get("format") != FORMAT:
        raise InputError(f"{path}: no scores of the format {FORMAT}")
    try:
        return ScoreSettings(**json.loads(header["settings"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: its settings cannot be read") from None
