"""Scores: what a teacher said of prepared rows, stored once and read in place of the teacher.

A folder holds `part-00000.safetensors`, ... of consecutive rows. Of each of a part's N tokens, all rows one after another, all masses as logs:

    values          float16 or float32 [N, k]  masses of the teacher's k likeliest classes, at temperature 1
    indices         int32 [N, k]               these classes
    realised        float32 [N]                log-probability of the row's own next token; meaningless where there is none
    starts          int64 [rows + 1]           where each row begins

A teacher of the student's vocabulary has its tokens as classes, and besides

    log_sum         float32 [N]                log of the summed exponentials of all logits; values + log_sum are logits
    log_normaliser  float32 [N]                the same of the logits divided by the temperature of the loss

Any other teacher has the cells of the two vocabularies as classes (`losses.cell_scores`), and besides

    own             float32 [N]                mass of the first listed cell, that of the next token, which `values` has rounded
    rest            float32 [N]                mass of the cells that are not listed, each to the power 1/temperature
    total           float32 [N]                mass of all cells

Headers hold the settings (`ScoreSettings`) and the first row; parts of other settings are made anew. Where there are validation rows,
`validation.json` (`MeasuredRows`) tells how well the teacher knows them. `checksums.json` seals all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xtoken_core.checksums import is_noted, note
from xtoken_core.errors import InputError, in_one_line
from xtoken_core.losses.cell_scores import CellScores
from xtoken_core.losses.logits import TopKLogits
from xtoken_core.results.record import Record

FORMAT = "xtoken-scores-3"
_ALWAYS = ("values", "indices", "realised")
_OF_TOKENS = (*_ALWAYS, "log_sum", "log_normaliser")
_OF_CELLS = (*_ALWAYS, "own", "rest", "total")


@dataclass(frozen=True)
class ScoreSettings:
    """What scores were made of. Scores of equal settings are the same."""

    teacher: str
    """Version of the model, by its content."""
    rows: str
    """`rows_digest` of the prepared rows."""
    num_rows: int
    top_k: int
    vocab_size: int
    """Columns of the logits: ids of the tokenizer; of the student's vocabulary those that all its models have a row for."""
    temperature: float
    dtype: str
    """In which the teacher ran."""
    cells: str = ""
    """`Partition.digest` of the classes; empty: they are tokens."""
    num_cells: int = 0
    domains: str = ""
    """Of the data, as a JSON list, whose rows alone were scored; empty: all. The others have no tokens here."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of what a part holds beside `starts`."""
        return _OF_CELLS if self.cells else _OF_TOKENS

    @property
    def classes(self) -> int:
        """How many there are: indices are below."""
        return self.num_cells if self.cells else self.vocab_size


MEASURED = "validation.json"


class MeasuredRows(Record):
    """How well a teacher knows rows."""

    rows: str
    """`rows_digest` of them."""
    domains: dict[str, tuple[float, float]]
    """By domain the nats of its targets, and their bytes."""


def rows_digest(rows: Any, column: str, domains: str = "") -> str:
    """Of the tokens that a teacher reads of prepared rows, and where it reads some `domains` only, of which rows are of those.

    column: `student_ids`, or the teacher's own.
    """
    digest = hashlib.sha256(domains.encode())
    for batch in rows.select_columns([column, "domain"] if domains else [column]).with_format("arrow").iter(1000):
        ids = batch[column].combine_chunks()
        digest.update(np.diff(ids.offsets.to_numpy()).astype("<i4").tobytes())
        digest.update(ids.flatten().to_numpy().astype("<i4").tobytes())
        if domains:
            digest.update(bytes(name in json.loads(domains) for name in batch["domain"].to_pylist()))
    return digest.hexdigest()[:16]


def part_file(folder: Path, part: int) -> Path:
    """Where a part lies."""
    return folder / f"part-{part:05}.safetensors"


def write_part(path: Path, tensors: dict[str, Tensor], settings: ScoreSettings, first: int) -> None:
    """Writes a part, whose first row has the number `first`, so that it appears whole or not at all, and seals it."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"format": FORMAT, "settings": json.dumps(asdict(settings), sort_keys=True), "first": str(first)})
    note(partial, path.name)  # before it is there: one that is there is sealed, whenever the process ends
    os.replace(partial, path)


def is_part(path: Path, settings: ScoreSettings) -> bool:
    """Whether a part of the settings lies there as it was written."""
    try:
        return is_noted(path) and _Part.read(path).settings == settings
    except InputError:
        return False


@dataclass(frozen=True)
class _Part:
    """What a part says of itself, held to what it is."""

    settings: ScoreSettings
    first: int
    starts: np.ndarray

    @classmethod
    def read(cls, path: Path) -> _Part:
        """Reads header and shapes. Raises InputError for what is not a part, or has tensors of other shapes than its header tells."""
        try:
            with safe_open(path, "pt") as file:
                header, names = file.metadata() or {}, set(file.keys())
                settings, first = _settings(header, path)
                if absent := sorted({*settings.tensors, "starts"} - names):
                    raise InputError(f"{path}: its {absent[0]} are missing")
                starts = file.get_tensor("starts").numpy()
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in settings.tensors}
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path}: cannot read the scores: {in_one_line(e)}") from None
        if starts.ndim != 1 or starts.dtype != np.int64 or not len(starts) or starts[0] != 0 or (np.diff(starts) < 0).any():
            raise InputError(f"{path}: its starts are not where rows begin")
        for name, shape in shapes.items():
            expected = (int(starts[-1]), settings.top_k)[: 2 if name in ("values", "indices") else 1]
            if shape != expected:
                raise InputError(f"{path}: {name} has the shape {list(shape)}, and not {list(expected)}")
        return cls(settings, first, starts)


class Scores:
    """The scores of one shard's rows, memory-mapped: a row is read when it is asked for."""

    def __init__(self, folder: str | Path):
        """Raises InputError for a folder without scores, or with parts that do not go together or are not all."""
        self.folder = Path(folder)
        self.parts = sorted(self.folder.glob("part-*.safetensors"))
        if not self.parts:
            raise InputError(f"{folder}: holds no scores")
        found = [_Part.read(path) for path in self.parts]
        self.settings: ScoreSettings = found[0].settings
        self._starts: list[np.ndarray] = [part.starts for part in found]
        self._first = np.cumsum([0, *(len(s) - 1 for s in self._starts)])
        self._open: dict[int, Any] = {}
        for path, part, first in zip(self.parts, found, self._first):
            if part.settings != self.settings:
                raise InputError(f"{path}: was scored with other settings than {self.parts[0].name}")
            if part.first != first:
                raise InputError(f"{path}: begins with row {part.first}, and the parts before it end at row {first}")
        if len(self) != self.settings.num_rows:
            raise InputError(
                f"{folder}: holds {len(self)} of {self.settings.num_rows} rows: a part is missing behind {path.name}"
            )

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a worker of the data loader maps the files itself

    def row(self, index: int) -> dict[str, Tensor]:
        """What is stored of one row of T tokens, by name, [T, ...]."""
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        if part not in self._open:
            self._open[part] = safe_open(self.parts[part], "pt").__enter__()
        file, starts, place = self._open[part], self._starts[part], index - int(self._first[part])
        first, last = int(starts[place]), int(starts[place + 1])
        return {name: file.get_slice(name)[first:last] for name in self.settings.tensors}


class ScoredTeacher:
    """A teacher of which only scores are there: what it would hand over of a micro-batch."""

    def __init__(self, shards: Sequence[Scores], column: str):
        """shards: of the prepared rows, in their order. column: of the rows, with the tokens that were scored.

        Raises InputError for shards that were scored differently.
        """
        self.shards, self.column = tuple(shards), column
        self.settings = self.shards[0].settings
        for shard in self.shards[1:]:
            if replace(shard.settings, rows=self.settings.rows, num_rows=self.settings.num_rows) != self.settings:
                raise InputError(f"{shard.folder}: was scored with other settings than {self.shards[0].folder}")

    def check_rows(self, shard: int, rows: Any) -> None:
        """Raises InputError unless this shard's scores were made of these rows, however many they are."""
        scores = self.shards[shard]
        if scores.settings.rows != rows_digest(rows, self.column, scores.settings.domains):
            raise InputError(f"{scores.folder}: made of other rows than these")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> TopKLogits | CellScores:
        """What stands for the logits of rows that know their `shard` and `row`, padded on the right."""
        found = [self.shards[int(row["shard"])].row(int(row["row"])) for row in rows]
        # a row that is of no domain of the teacher's has no scores, and may be the longest
        width = max(len(row[self.column]) for row in rows)
        of = {name: _padded([row[name] for row in found], width) for name in found[0]}
        if of["indices"].numel() and not 0 <= of["indices"].min() <= of["indices"].max() < self.settings.classes:
            raise InputError(f"{self.shards[0].folder}: a score is of a class that is none of {self.settings.classes}")
        values = of["values"].float()
        if not self.settings.cells:
            return TopKLogits(values + of["log_sum"][..., None], of["indices"], self.settings.vocab_size)
        values[..., 0] = of["own"]
        sizes = self.settings.num_cells, self.settings.vocab_size
        return CellScores(values, of["indices"], of["rest"], of["total"], of["realised"], *sizes)


def _padded(rows: list[Tensor], width: int) -> Tensor:
    """[B, width, ...]: rows [T, ...] with zeros on the right."""
    padded = pad_sequence(rows, batch_first=True)
    return torch.cat([padded, padded.new_zeros(len(rows), width - padded.shape[1], *padded.shape[2:])], 1)


def _settings(header: dict[str, str], path: Path) -> tuple[ScoreSettings, int]:
    """The settings and the number of the first row."""
    if header.get("format") != FORMAT:
        raise InputError(f"{path}: no scores of the format {FORMAT}")
    try:
        settings = TypeAdapter(ScoreSettings).validate_json(header["settings"])
        TypeAdapter(list[str]).validate_json(settings.domains or "[]")
        return settings, int(header["first"])
    except (KeyError, ValueError):
        raise InputError(f"{path}: its settings cannot be read") from None
