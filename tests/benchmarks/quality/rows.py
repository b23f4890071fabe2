"""The lab's rows: what the library prepares and collates, kept as padded tensors so that a batch is a gather on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xtoken_core.data.batch import Batch, Collator, Side
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.data.reading import load_rows
from xtoken_core.losses import TeacherBatch
from xtoken_core.spec import DistillationSpec

_SIDE = {"input_ids": np.int32, "token_mask": np.uint8, "attention_mask": np.uint8, "token_bytes": np.uint8}
_CHUNKS = {"student_chunk_id": np.int16, "teacher_chunk_id": np.int16, "chunk_valid": bool, "chunk_exact": bool}


def prepare(spec: DistillationSpec, name: str, folder: Path) -> None:
    """Tokenizes, aligns and collates a spec's training data into `folder`/NAME.npz: student's [N, T] and every teacher's arrays, padded.

    `domain` [N] is the number of the part of the data that each row is of.
    """
    rows_folder = folder / "rows" / name
    prepare_rows(spec, rows_folder)
    rows, collate = load_rows(rows_folder), Collator.for_rows(spec, rows_folder)
    parts = [_flat(collate([rows[i] for i in range(n, min(n + 512, len(rows)))])) for n in range(0, len(rows), 512)]
    arrays = {name: np.concatenate([_wide(part[name], spec.data.max_length) for part in parts]) for name in parts[0]}
    arrays["domain"] = np.array([row["part"] for row in rows], np.int16)
    np.savez_compressed(folder / f"{name}.npz", **arrays)


def _flat(batch: Batch) -> dict[str, np.ndarray]:
    """A collated batch as compact arrays: `input_ids`, ..., `0.input_ids`, ... for teacher 0."""
    arrays = _side(batch.student, "")
    for i, side in enumerate(batch.teachers):
        if side.chunks is not None:
            arrays |= _side(side, f"{i}.")
            arrays |= {f"{i}.{name}": getattr(side.chunks, name).numpy().astype(kind) for name, kind in _CHUNKS.items()}
    return arrays


def _side(side: Side, prefix: str) -> dict[str, np.ndarray]:
    return {prefix + name: getattr(side, name).numpy().astype(kind) for name, kind in _SIDE.items()}


def _wide(array: np.ndarray, width: int) -> np.ndarray:
    """[N, T] -> [N, width]: chunk ids filled with -1, everything else with 0 (padding is masked)."""
    fill = -1 if array.dtype == np.int16 else 0
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


@dataclass(frozen=True)
class Rows:
    """Rows on a device."""

    arrays: dict[str, Tensor]
    """As `prepare` wrote them."""

    @classmethod
    def load(cls, path: Path, device: torch.device, limit: int | None = None) -> Rows:
        """The first `limit` rows of a file of `prepare`."""
        with np.load(path) as file:
            return cls({name: torch.from_numpy(file[name][:limit]).to(device) for name in file.files})

    @classmethod
    def as_teacher(cls, path: Path, device: torch.device, teacher: int = 0) -> Rows:
        """The same, read by a student that has the vocabulary of one of the teachers."""
        arrays, prefix = cls.load(path, device).arrays, f"{teacher}."
        return cls({name: arrays[prefix + name] for name in _SIDE})

    def __len__(self) -> int:
        return len(self.arrays["input_ids"])

    def student(self, index: Tensor) -> dict[str, Tensor]:
        """The student's side of some rows, as the collator has it."""
        batch = {name: self.arrays[name][index].long() for name in _SIDE}
        return batch | {"sample_mask": torch.ones(len(index), device=index.device)}

    def teacher_ids(self, teacher: int, index: Tensor) -> Tensor:
        """[n, T] int64: what teacher number `teacher` reads of some rows (the student's ids, where the vocabulary is the same)."""
        return self.arrays.get(f"{teacher}.input_ids", self.arrays["input_ids"])[index].long()

    def attention(self, teacher: int, index: Tensor) -> Tensor:
        """[n, T]: 1 where teacher number `teacher` reads no padding."""
        return self.arrays.get(f"{teacher}.attention_mask", self.arrays["attention_mask"])[index]

    def teacher_fields(self, teacher: int, index: Tensor) -> dict[str, Tensor]:
        """The fields of a cross-tokenizer teacher's `TeacherBatch`; none for one with the student's vocabulary."""
        if f"{teacher}.input_ids" not in self.arrays:
            return {}
        fields = [name for name in TeacherBatch.__dataclass_fields__ if f"{teacher}.{name}" in self.arrays]
        return {name: _widened(self.arrays[f"{teacher}.{name}"][index]) for name in fields}


def _widened(array: Tensor) -> Tensor:
    return array if array.dtype == torch.bool else array.long()


def orders(rows: int, steps: int, batch: int, seed: int) -> Sequence[Tensor]:
    """Row indices of each step, on the CPU: every row once an epoch, in an order that depends on the seed only."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    while len(order) < steps * batch:
        order = torch.cat([order, torch.randperm(rows, generator=generator)])
    return order[: steps * batch].split(batch)
