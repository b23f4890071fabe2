"""Batches of rows, as tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtoken_core.data.rows import Row
from xtoken_core.spec import DistillationSpec


class Collator:
    """Pads rows on the right into one batch, as tensors on the CPU.

    The batch, B rows of T tokens on the student's side:

        input_ids, attention_mask, token_mask   int64 [B, T]; attention_mask 1: no padding, token_mask 1: a target
        token_bytes                             int32 [B, T]: bytes of text under each token
        sample_mask                             float32 [B]: ones
        teachers                                one dict per teacher, None for one with the student's vocabulary: the same keys
                                                [B, T_t] but sample_mask, student_chunk_id [B, T] and teacher_chunk_id [B, T_t]
                                                int64 (-1 outside chunks), chunk_valid and chunk_exact bool [B, C]

    No row of logits predicts the first token of a document, so it is no target and belongs to no chunk; a chunk that
    thereby has no token left on a side, or with `chunk_distribution: first` loses its first, is not valid.

    Items of a packed dataset are lists of rows. Then the batch is that of all these rows one by one, as losses want it, and
    each side has in `packed` what its model reads:

        input_ids, position_ids                 int64 [R, L]: the documents of an item in one row; positions restart with each, and
                                                with the padding
        gather                                  int64 [B, T]: where each token lies in the flattened [R * L]; 0 for padding
    """

    def __init__(self, columns: Sequence[str | None], pads: dict[str, int], chunk_distribution: str = "mean"):
        """columns: per teacher the prefix of its columns, None with the student's vocabulary. pads: filling id per prefix."""
        self.columns, self.pads, self.chunk_distribution = tuple(columns), pads, chunk_distribution

    @classmethod
    def for_rows(cls, spec: DistillationSpec, folder: str | Path) -> Collator:
        """The collator of the rows that `prepare_rows` wrote to `folder`."""
        pads = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))["pads"]
        columns = [f"teacher_{i}" if teacher.cross_tokenizer else None for i, teacher in enumerate(spec.teachers)]
        return cls(columns, pads, spec.loss.chunk_distribution)

    def __call__(self, items: Sequence[Row] | Sequence[list[Row]]) -> dict[str, Any]:
        """See the class."""
        groups = [item for item in items if isinstance(item, list)]
        rows = [row for item in items for row in (item if isinstance(item, list) else [item])]
        batch: dict[str, Any] = {**self._tokens(rows, groups, "student"), "sample_mask": torch.ones(len(rows))}
        batch["teachers"] = [
            None if column is None else self._tokens(rows, groups, column) | self._chunks(rows, column) for column in self.columns
        ]
        return batch

    def _tokens(self, rows: list[Row], groups: list[list[Row]], column: str) -> dict[str, Any]:
        """What one side reads."""
        targets = _padded([row[f"{column}_mask"] for row in rows], 0)
        targets[:, 0] = 0
        arrays = {
            "input_ids": _padded([row[f"{column}_ids"] for row in rows], self.pads[column]),
            "attention_mask": _padded([np.ones_like(row[f"{column}_ids"]) for row in rows], 0),
            "token_mask": targets,
            "token_bytes": _padded([row[f"{column}_bytes"] for row in rows], 0, np.int32),
        }
        return _tensors(arrays) | ({"packed": self._packed(groups, column)} if groups else {})

    def _packed(self, groups: list[list[Row]], column: str) -> dict[str, Tensor]:
        ids = [[row[f"{column}_ids"] for row in group] for group in groups]
        lengths = [[len(i) for i in group] for group in ids]
        width = max(map(sum, lengths))
        positions = [[np.arange(n) for n in [*group, width - sum(group)]] for group in lengths]
        starts = [r * width + start for r, group in enumerate(lengths) for start in np.cumsum([0, *group[:-1]])]
        gather = [start + np.arange(n) for start, n in zip(starts, (n for group in lengths for n in group))]
        return _tensors(
            {
                "input_ids": _padded([np.concatenate(group) for group in ids], self.pads[column]),
                "position_ids": _padded([np.concatenate(group) for group in positions], 0),
                "gather": _padded(gather, 0),
            }
        )

    def _chunks(self, rows: list[Row], column: str) -> dict[str, Tensor]:
        """How one teacher's tokens and the student's meet."""
        students = _padded([row[f"{column}_student_chunk_id"] for row in rows], -1)
        teachers = _padded([row[f"{column}_teacher_chunk_id"] for row in rows], -1)
        exact = _padded([row[f"{column}_chunk_exact"] for row in rows], False, bool)
        counts = [len(row[f"{column}_chunk_exact"]) for row in rows]
        valid = _padded([self._valid(s, t, n) for s, t, n in zip(students, teachers, counts)], False, bool)
        students[:, 0] = teachers[:, 0] = -1
        return _tensors({"student_chunk_id": students, "teacher_chunk_id": teachers, "chunk_valid": valid, "chunk_exact": exact})

    def _valid(self, student: np.ndarray, teacher: np.ndarray, count: int) -> np.ndarray:
        """[count] bool: the chunks of one document that keep a predictor row on both sides."""
        valid = np.ones(count, bool)
        for ids in (student, teacher):
            predicted = ids[1:]
            valid &= np.bincount(predicted[predicted >= 0], minlength=count) > 0
            if self.chunk_distribution == "first" and ids[0] >= 0:
                valid[ids[0]] = False
        return valid


def _padded(rows: Sequence[np.ndarray], fill: int, dtype: type = np.int64) -> np.ndarray:
    """[B, T]: the rows, filled up on the right."""
    out: np.ndarray = np.full((len(rows), max(map(len, rows))), fill, dtype)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
