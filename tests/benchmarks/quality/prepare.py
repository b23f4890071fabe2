"""Rows of a student under its teachers, and W with the cells of each pair."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.benchmarks.quality.rows import prepare
from xtoken_core.data.rows import teacher_column
from xtoken_core.first_tokens import FIRST_TOKENS, read_first_tokens
from xtoken_core.partition import join_cells, seen_together, share_apart
from xtoken_core.projection import build_projection
from xtoken_core.spec import DistillationSpec, ProjectionSpec
from xtoken_core.tokenization import TokenTable, load_tokenizer


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
    """W and cells of each pair, and the same with cells joined that the training rows show to be seen together, as a run has them."""
    own = load_tokenizer(student)
    table = TokenTable.from_tokenizer(own)
    for i, teacher in enumerate(teachers):
        tokenizer = load_tokenizer(teacher)
        w = build_projection(own, tokenizer, ProjectionSpec())
        fingerprints = table.fingerprint, TokenTable.from_tokenizer(tokenizer).fingerprint
        w.save(out / f"w-{i}.safetensors", *fingerprints)
        assert w.cells is not None
        first = read_first_tokens(out / "rows" / "train" / FIRST_TOKENS, teacher_column(f"t{i}"))
        cells = join_cells(w.cells, seen_together(w.cells, first))
        before, after = share_apart(w.cells, first), share_apart(cells, first)
        print(f"first tokens of chunks in different cells: {before:.4f}, joined {after:.4f}")
        replace(w, cells=cells).save(out / f"joined-{i}.safetensors", *fingerprints)
