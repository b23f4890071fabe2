"""Batches of rows, as tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtoken_core.rows import Row
from xtoken_core.spec import DistillationSpec


class Collator:
    """Pads rows on the right into one batch; an item may be a list of rows, which then share a row of the batch.

    The batch, B rows of T tokens on the student's side:

        input_ids, attention_mask, token_mask     int64 [B, T]; attention_mask 1: no padding, token_mask 1: a target
        token_bytes                               int32 [B, T]: bytes of text under each token
        sample_mask                               float32 [B]: ones
        position_ids, segment_ids                 int64 [B, T], only of packed rows: positions restart with every document (padding
                                                  counts as one more), documents are numbered from 1 (padding: 0)
        teachers                                  one dict per teacher, None for one with the student's vocabulary: the same keys (all but
                                                  sample_mask) [B, T_t], student_chunk_id [B, T] and teacher_chunk_id [B, T_t] int64
                                                  (-1 outside chunks), chunk_valid and chunk_exact bool [B, C]

    No row of logits predicts the first token of a document, so it is no target and belongs to no chunk; a chunk that
    thereby has no token left on a side, or with `chunk_distribution: first` loses its first, is not valid. A packed row hence
    counts exactly what its documents count one by one.
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

    def __call__(self, items: Sequence[Row | list[Row]]) -> dict[str, Any]:
        """See the class."""
        groups = [item if isinstance(item, list) else [item] for item in items]
        packed = any(isinstance(item, list) for item in items)
        batch: dict[str, Any] = self._tokens(groups, "student", packed)
        batch["sample_mask"] = torch.ones(len(groups))
        batch["teachers"] = [
            None if column is None else self._tokens(groups, column, packed) | self._chunks(groups, column)
            for column in self.columns
        ]
        return batch

    def _tokens(self, groups: list[list[Row]], column: str, packed: bool) -> dict[str, Tensor]:
        """What one side reads."""
        length = max(sum(len(row[f"{column}_ids"]) for row in group) for group in groups)
        shape = (len(groups), length)
        ids = np.full(shape, self.pads[column], np.int64)
        attention, targets, positions, segments = (np.zeros(shape, np.int64) for _ in range(4))
        widths = np.zeros(shape, np.int32)
        for b, group in enumerate(groups):
            at = 0
            for number, row in enumerate(group, 1):
                part = slice(at, at := at + len(row[f"{column}_ids"]))
                ids[b, part] = row[f"{column}_ids"]
                targets[b, part] = row[f"{column}_mask"]
                targets[b, part.start] = 0
                widths[b, part] = row[f"{column}_bytes"]
                segments[b, part] = number
                positions[b, part] = np.arange(at - part.start)
            attention[b, :at] = 1
            positions[b, at:] = np.arange(length - at)
        arrays = {"input_ids": ids, "attention_mask": attention, "token_mask": targets, "token_bytes": widths}
        if packed:
            arrays |= {"position_ids": positions, "segment_ids": segments}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _chunks(self, groups: list[list[Row]], column: str) -> dict[str, Tensor]:
        """How one teacher's tokens and the student's meet."""
        students = _padded([[row[f"{column}_student_chunk_id"] for row in group] for group in groups])
        teachers = _padded([[row[f"{column}_teacher_chunk_id"] for row in group] for group in groups])
        counts = [[len(row[f"{column}_chunk_exact"]) for row in group] for group in groups]
        shape = (len(groups), max(sum(count) for count in counts))
        valid, exact = np.zeros(shape, bool), np.zeros(shape, bool)
        for b, group in enumerate(groups):
            at_student = at_teacher = chunk = 0
            for row, count in zip(group, counts[b]):
                student = students[b, at_student : (at_student := at_student + len(row[f"{column}_student_chunk_id"]))]
                teacher = teachers[b, at_teacher : (at_teacher := at_teacher + len(row[f"{column}_teacher_chunk_id"]))]
                part = slice(chunk, chunk := chunk + count)
                valid[b, part] = self._valid(student, teacher, count)
                exact[b, part] = row[f"{column}_chunk_exact"]
                for ids in (student, teacher):  # views: changes the batch
                    ids[0] = -1
                    ids[ids >= 0] += part.start
        arrays = {"student_chunk_id": students, "teacher_chunk_id": teachers, "chunk_valid": valid, "chunk_exact": exact}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _valid(self, student: np.ndarray, teacher: np.ndarray, count: int) -> np.ndarray:
        """[count] bool: the chunks of one document that keep a predictor row on both sides."""
        valid = np.ones(count, bool)
        for ids in (student, teacher):
            predicted = ids[1:]
            valid &= np.bincount(predicted[predicted >= 0], minlength=count) > 0
            if self.chunk_distribution == "first" and ids[0] >= 0:
                valid[ids[0]] = False
        return valid


def _padded(groups: list[list[np.ndarray]]) -> np.ndarray:
    """[B, T] int64 of concatenated arrays, -1 behind them."""
    rows = [np.concatenate(group) for group in groups]
    out = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out
