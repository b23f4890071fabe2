"""Stored projection matrices: what is read of a file, and held to what the file claims."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xtoken_core.errors import InputError
from xtoken_core.partition import Partition

FORMAT = "xtoken-projection"
FORMAT_VERSION = "1"
ROW_SUMS = "row_sums"
"""Header key: `one`, every row with entries sums to 1 (also where the key is absent); `any`, they are as they were imported."""

LARGEST_ID = 2**31 - 1
"""Ids are stored as int32."""
MOST_ENTRIES = 2**29
"""Slots of a table made from counts: beyond, one row holds so many entries that the table would fill the memory."""
_SUM_TOLERANCE = 1e-3

log = logging.getLogger(__name__)


def read_projection(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the tensors of a file in this project's format. Raises InputError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: cannot read the projection: {_first_line(e)}") from None
    if header.get("format") != FORMAT or header.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path}: not a projection of format version {FORMAT_VERSION}")
    return header, tensors


def vocabulary_size(header: dict[str, str], path: str | Path, teacher_ids: int | None) -> int | None:
    """The teacher's number of ids: as the header says, or else `teacher_ids`. Raises InputError where they contradict."""
    told = header.get("teacher_vocab_size")
    if told is None:
        return teacher_ids
    if not (told.isascii() and told.isdigit() and len(told) <= 10 and 0 < int(told) <= LARGEST_ID):
        raise InputError(f"{path}: teacher_vocab_size {told[:40]!r} is not a number of ids")
    if teacher_ids is not None and int(told) != teacher_ids:
        raise InputError(f"{path}: made for a teacher of {told} ids, but this one has {teacher_ids}")
    return int(told)


def checked_entries(indices: Any, weights: Any, rows: int | None, columns: int | None, path: str | Path) -> tuple[Tensor, Tensor]:
    """The entries of a file as int64 and float32 [V_s, k], those without an id weighing 0.

    rows, columns: ids of student and teacher, where known. Raises InputError for shapes, ids or weights that cannot be.
    """
    if not isinstance(indices, Tensor) or not isinstance(weights, Tensor):
        raise InputError(f"{path}: indices or weights are missing")
    whole = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if indices.ndim != 2 or indices.shape != weights.shape or not whole or not weights.is_floating_point():
        raise InputError(
            f"{path}: indices {tuple(indices.shape)} {indices.dtype} and weights {tuple(weights.shape)} {weights.dtype} "
            "do not go together"
        )
    if not (indices >= 0).any():
        raise InputError(f"{path}: indices {tuple(indices.shape)} hold no entry")
    if rows is not None and len(indices) != rows:
        raise InputError(f"{path}: has {len(indices)} rows, but the student has {rows} ids")
    indices, weights = indices.to(torch.int64), weights.to(torch.float32)
    last = LARGEST_ID if columns is None else columns - 1
    if indices.min() < -1 or indices.max() > last:
        raise InputError(f"{path}: teacher ids outside -1 .. {last}")
    weights = weights.masked_fill(indices < 0, 0.0)
    if not weights.isfinite().all() or (weights < 0).any():
        raise InputError(f"{path}: weights that are negative, infinite or not a number")
    return indices, weights


def checked_exact(exact: Tensor | None, indices: Tensor, path: str | Path) -> Tensor | None:
    """The mask of exact rows, bool [V_s]. Raises InputError for another shape or type, and for exact rows without an entry."""
    if exact is None:
        return None
    if exact.shape != indices.shape[:1] or exact.dtype != torch.bool:
        raise InputError(f"{path}: exact {tuple(exact.shape)} {exact.dtype} does not go with {len(indices)} rows")
    if (exact & (indices < 0).all(1)).any():
        raise InputError(f"{path}: rows that are exact and have no entry")
    return exact


def checked_cells(tensors: dict[str, Tensor], rows: int, columns: int | None, path: str | Path) -> Partition | None:
    """The cells of a file; None: it has none. Raises InputError for cells of other vocabularies, and for ids that cannot be."""
    student, teacher = tensors.get("student_cells"), tensors.get("teacher_cells")
    if student is None or teacher is None:
        return None
    if student.shape != (rows,) or teacher.ndim != 1 or len(teacher) != (columns or len(teacher)):
        raise InputError(f"{path}: cells {tuple(student.shape)} and {tuple(teacher.shape)} do not go with {rows} rows")
    if student.dtype != torch.int32 or teacher.dtype != torch.int32 or min(student.min(), teacher.min()) < -1:
        raise InputError(f"{path}: cells that are not numbered from 0, or -1")
    count = 1 + int(max(student.max(), teacher.max()))
    if count > rows or count > len(teacher):
        raise InputError(f"{path}: {count} cells, more than a vocabulary has ids")
    return Partition(student.long(), teacher.long(), count)


def rows_sum_to_one(weights: Tensor) -> bool:
    """Whether every row of weights [V_s, k] sums to 1 or to 0."""
    sums = weights.detach().double().sum(1)
    return bool((((sums - 1).abs() < _SUM_TOLERANCE) | (sums == 0)).all())


def read_nemo_rl(path: str | Path, student_ids: int | None, teacher_ids: int | None) -> tuple[Tensor, Tensor]:
    """(indices, weights) of NeMo-RL's .pt, entries first in their order; see `Projection.from_nemo_rl`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises EOFError, RuntimeError, UnpicklingError, KeyError ... for bad files
        raise InputError(f"{path}: cannot read the projection: {type(e).__name__}: {_first_line(e)}") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: expected a dict of indices and likelihoods, or of (student, teacher) -> count")
    if "indices" in content:
        indices, weights = content.get("indices"), content.get("likelihoods")
    else:
        indices, weights = _rows_from_counts(content, student_ids, path)
    indices, weights = checked_entries(indices, weights, student_ids, teacher_ids, path)
    log.warning(
        "%s: %d of %d slots hold no entry (-1), %d entries of weight 0 dropped, %d rows empty",
        path,
        int((indices < 0).sum()),
        indices.numel(),
        int(((indices >= 0) & (weights == 0)).sum()),
        int((weights.sum(1) == 0).sum()),
    )
    indices = indices.masked_fill(weights == 0, -1)
    order = (indices < 0).to(torch.int8).argsort(dim=1, stable=True)
    return indices.gather(1, order), weights.gather(1, order)


def _rows_from_counts(counts: dict[Any, Any], rows: int | None, path: str | Path) -> tuple[Tensor, Tensor]:
    """(student, teacher) -> count as padded rows, the largest counts first."""
    try:
        pairs = np.array(list(counts), dtype=np.int64).reshape(len(counts), 2)
        values = np.array([float(v) for v in counts.values()])
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InputError(f"{path}: expected a dict of (student, teacher) -> count") from None
    student, teacher = pairs.T
    last = LARGEST_ID if rows is None else rows - 1
    if student.min() < 0 or student.max() > last:
        raise InputError(f"{path}: student ids outside 0 .. {last}")
    order = np.lexsort((teacher, -values, student))
    student, teacher, values = student[order], teacher[order], values[order]
    rows = int(student[-1]) + 1 if rows is None else rows
    per_row = np.bincount(student, minlength=rows)
    if rows * int(per_row.max()) > MOST_ENTRIES:
        raise InputError(f"{path}: {rows} rows, one with {per_row.max()} entries: too many for one table")
    slot = np.arange(len(student)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    indices, weights = torch.full((rows, int(per_row.max())), -1), torch.zeros(rows, int(per_row.max()), dtype=torch.float64)
    indices[student, slot], weights[student, slot] = torch.from_numpy(teacher), torch.from_numpy(values)
    return indices, weights


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
