"""Rows of a student under its teachers, and W with the cells of each pair."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.quality.rows import prepare
from xtoken_core.partition import Partition
from xtoken_core.projection import Projection, build_projection
from xtoken_core.spec import DistillationSpec, ProjectionSpec
from xtoken_core.tokenization import TokenTable, load_tokenizer

JOINED_SHARE = 0.05
"""Cells are joined that a chunk's two first tokens are in, one each, in this share of the cases in which either is seen."""


def prepare_folder(student: str, teachers: Sequence[str], text: Path, out: Path, max_length: int) -> None:
    """Writes train.npz and one file for each held-out text (every other .jsonl of `text`), w-I.safetensors and joined-I.safetensors.

    Text to train on is train.jsonl, or train.DOMAIN.jsonl of several domains, whose numbers in the rows are in the order of their names.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = defaultdict(list)
    for file in sorted(text.glob("*.jsonl")):
        files[file.name.split(".")[0]].append({"uri": str(file), "domain": file.stem.partition(".")[2] or None})
    for name, parts in files.items():
        values = {
            "name": "lab",
            "student": {"model": student},
            "teachers": [{"id": f"t{i}", "model": teacher, "projection": {}} for i, teacher in enumerate(teachers)],
            "loss": {"mode": "p_kl"},
            "data": {"train": parts, "max_length": max_length},
            "training": {"max_steps": 1, "report_to": []},
            "output": {"uri": str(out)},
        }
        prepare(DistillationSpec.model_validate(values), name, out)
    write_projections(student, teachers, out)


def write_projections(student: str, teachers: Sequence[str], out: Path) -> None:
    """W and cells of each pair, and the same with cells joined that the training rows show to be seen together."""
    own = load_tokenizer(student)
    table = TokenTable.from_tokenizer(own)
    with np.load(out / "train.npz") as arrays:
        for i, teacher in enumerate(teachers):
            tokenizer = load_tokenizer(teacher)
            w = build_projection(own, tokenizer, ProjectionSpec())
            fingerprints = table.fingerprint, TokenTable.from_tokenizer(tokenizer).fingerprint
            w.save(out / f"w-{i}.safetensors", *fingerprints)
            assert w.cells is not None
            cells = join_cells(w.cells, seen_together(w, {name: arrays[name] for name in arrays.files}, i))
            Projection(w.indices, w.weights, w.teacher_vocab_size, w.exact, cells).save(
                out / f"joined-{i}.safetensors", *fingerprints
            )


def join_cells(partition: Partition, pairs: Sequence[tuple[int, int]]) -> Partition:
    """The same with the two cells of each pair made one."""
    parent = list(range(partition.num_cells))

    def root(cell: int) -> int:
        while parent[cell] != cell:
            parent[cell] = parent[parent[cell]]
            cell = parent[cell]
        return cell

    for a, b in pairs:
        parent[root(b)] = root(a)
    roots = torch.tensor([root(cell) for cell in range(partition.num_cells)])
    kept, number = roots.unique(return_inverse=True)
    number = torch.cat([number, torch.tensor([-1])])  # -1 stays
    return Partition(number[partition.student], number[partition.teacher], len(kept))


def seen_together(w: Projection, arrays: dict[str, np.ndarray], teacher: int) -> list[tuple[int, int]]:
    """Pairs of cells for `join_cells`, counted over the first tokens of all chunks of the rows."""
    assert w.cells is not None
    student = _first_cells(arrays["input_ids"], arrays[f"{teacher}.student_chunk_id"], w.cells.student)
    other = _first_cells(arrays[f"{teacher}.input_ids"], arrays[f"{teacher}.teacher_chunk_id"], w.cells.teacher)
    keys = sorted(student.keys() & other.keys())
    a, b = np.array([student[k] for k in keys]), np.array([other[k] for k in keys])
    apart = (a != b) & (a >= 0) & (b >= 0)
    print(f"first tokens of chunks in different cells: {apart.mean():.4f} of {len(a)}")
    pairs, counts = np.unique(np.stack([a[apart], b[apart]], 1), axis=0, return_counts=True)
    seen = np.bincount(np.concatenate([a[a >= 0], b[(b >= 0) & (a != b)]]), minlength=w.cells.num_cells)
    together = counts >= JOINED_SHARE * np.minimum(seen[pairs[:, 0]], seen[pairs[:, 1]])
    return [(int(x), int(y)) for x, y in pairs[together]]


def _first_cells(ids: np.ndarray, chunk: np.ndarray, cells: torch.Tensor) -> dict[int, int]:
    """Of every chunk, numbered over all rows, the cell of its first token."""
    row, position = np.nonzero((chunk >= 0) & (np.concatenate([np.full((len(chunk), 1), -1), chunk[:, :-1]], 1) != chunk))
    numbers = row * (ids.shape[1] + 1) + chunk[row, position]
    return dict(zip(numbers[::-1].tolist(), cells.numpy()[ids[row, position]][::-1].tolist()))
