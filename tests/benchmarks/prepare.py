"""Speed of preparing rows: `python -m tests.benchmarks.prepare [--texts FOLDER ...] [--megabytes 20] [--pairs llama3:qwen3 ...] [--cores N]`.

Documents are read, tokenized by both tokenizers, aligned, cut and written, as the prepare step does it. One JSON line per pair: megabytes a second, and for each core:
on one core (the default) by CPU seconds, which hardly depend on what else the machine does; on several by the clock. The last line is a summary.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from tests.benchmarks.alignment import documents
from tests.support import assets
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.data.rows import load_sides
from xtoken_core.spec import DistillationSpec

TARGET = 2.0
"""Megabytes a second and core."""


def cpu_seconds() -> float:
    """Of this process and its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_pair(pair: str, corpus: Path, megabytes: float, cores: int) -> dict:
    """One pair's line."""
    student, teacher = (str(assets.tokenizer_folder(name)) for name in pair.split(":"))
    with tempfile.TemporaryDirectory() as out:
        spec = DistillationSpec.model_validate({
            "name": "prepare", "student": {"model": student}, "teachers": [{"id": "t", "model": teacher, "projection": {}}],
            "data": {"train": [str(corpus)], "max_length": 2048}, "output": {"uri": out},
        })  # fmt: skip
        sides = load_sides(spec)  # once a run, whatever its size
        prepare_rows(
            spec.model_copy(update={"data": spec.data.model_copy(update={"max_rows": 1})}), Path(out) / "warm", sides=sides
        )
        started, used = time.monotonic(), cpu_seconds()
        stats = prepare_rows(spec, Path(out) / "train", sides=sides)
        seconds, used = time.monotonic() - started, cpu_seconds() - used
    a_core = megabytes / (used if cores == 1 else cores * seconds)
    return {
        "pair": pair, "megabytes": round(megabytes, 1), "rows": stats.rows, "student_tokens": stats.student_tokens, "seconds": round(seconds, 1),
        "mb_per_s": round(megabytes / seconds, 2), "mb_per_s_and_core": round(a_core, 2), "met": a_core >= TARGET,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="files and folders; default: Python's own library")
    parser.add_argument("--megabytes", type=float, default=20.0, help="how much of the texts to prepare")
    parser.add_argument("--pairs", nargs="*", default=["llama3:qwen3"], help=f"student:teacher, of {', '.join(assets.SOURCES)}")
    parser.add_argument("--cores", type=int, default=1)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    results = []
    with tempfile.TemporaryDirectory() as folder:
        corpus, size = Path(folder) / "text.jsonl", 0
        with corpus.open("w") as file:
            for _, text in documents(options.texts, options.megabytes):
                size += len(text.encode())
                file.write(json.dumps({"text": text}) + "\n")
        for pair in options.pairs:
            results.append(run_pair(pair, corpus, size / 1e6, options.cores))
            print(json.dumps(results[-1]), flush=True)
    slowest = min(results, key=lambda line: line["mb_per_s_and_core"])
    print(json.dumps({
        "summary": "prepare", "cores": options.cores, "pairs": len(results), "slowest": slowest["pair"],
        "mb_per_s_and_core": slowest["mb_per_s_and_core"], "target_mb_per_s_and_core": TARGET, "met": all(r["met"] for r in results),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
