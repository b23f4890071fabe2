"""Building W for pairs of real tokenizers: seconds, memory, and what the rows look like.

    python -m tests.benchmarks.projection [--pairs llama3:qwen3 ...]

`seconds` are CPU seconds of the whole process for what a run does: both token tables and W (tokenizers loaded before), of
which `seconds_tables` for the tables; `wall_seconds` as the clock saw it. One JSON line a pair, and a summary.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from tests.benchmarks.memory import peak_mib
from tests.support import assets
from xtoken_core.overlap import overlap_matrix
from xtoken_core.projection import Projection, build_projection
from xtoken_core.spec import ProjectionSpec
from xtoken_core.tokenization import TokenTable

PAIRS = (
    *("llama3:qwen3", "llama3:gemma3", "qwen3:o200k", "gemma3:smollm2", "smollm2:gemma3", "mistral:llama3"),
    *("llama3:mistral", "tekken:deepseek"),
)


def run_pair(pair: str) -> dict[str, Any]:
    """The record of one pair."""
    student, teacher = (assets.tokenizer(name) for name in pair.split(":"))
    made: list[Projection] = []

    def build() -> None:
        made.append(build_projection(student, teacher, ProjectionSpec()))

    wall, cpu = time.perf_counter(), time.process_time()
    memory = peak_mib(build)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    start = time.process_time()
    tables = [TokenTable.from_tokenizer(tok) for tok in (student, teacher)]
    of_tables = time.process_time() - start
    w, per_row = made[0], (made[0].indices >= 0).sum(1)
    lacking = [b for b in range(256) if bytes([b]) not in tables[1].ids_by_bytes]
    ordinary_empty = (per_row == 0).numpy() & tables[0].ordinary
    return {
        "student": pair.split(":")[0],
        "teacher": pair.split(":")[1],
        "rows": len(w.indices),
        "columns": w.teacher_vocab_size,
        "seconds": round(cpu, 2),
        "seconds_tables": round(of_tables, 2),
        "wall_seconds": round(wall, 2),
        "peak_mib": memory,
        "exact_rows": round(float(w.exact.float().mean()) if w.exact is not None else 0.0, 4),
        "entries_per_row": per_row.bincount(minlength=5).tolist(),
        "ordinary_rows_empty": int(ordinary_empty.sum()),
        "bytes_the_teacher_lacks": len(lacking),
    }


def overlaps() -> dict[str, Any]:
    """The overlap coefficient of every pair of the tokenizers at hand."""
    names = list(assets.SOURCES)
    matrix = overlap_matrix([assets.table(name) for name in names])
    return {"overlap": {name: dict(zip(names, row)) for name, row in zip(names, np.round(matrix, 4).tolist())}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="*", default=PAIRS, help=f"student:teacher, of {', '.join(assets.SOURCES)}")
    parser.add_argument("--overlap", action="store_true", help="also the overlap of all tokenizers, pair by pair")
    options = parser.parse_args()
    records = []
    for pair in options.pairs:
        records.append(run_pair(pair))
        print(json.dumps(records[-1]), flush=True)
    if options.overlap:
        print(json.dumps(overlaps()), flush=True)
    summary = {
        "summary": "projection",
        "pairs": len(records),
        "max_seconds": max(r["seconds"] for r in records),
        "max_peak_mib": max(r["peak_mib"] for r in records),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
