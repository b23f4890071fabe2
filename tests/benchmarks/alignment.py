"""Alignment over a corpus: is every chunk byte-identical, and how fast is it?

    python -m tests.benchmarks.alignment [--texts FILE_OR_FOLDER ...] [--pairs llama3:qwen3 ...] [--megabytes 4]

Without `--texts` it reads the interpreter's own sources, to which it always adds a generated text of rare scripts, emoji
and white space. Every document is aligned twice: as the normalisers leave it, where every chunk must be byte-identical,
and as it comes. Speed is CPU time of one thread, on rows of 2,000 student tokens, beside a plain Python two-pointer walk
over the same byte lengths in the same run. One JSON line a pair, and a summary.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.memory import peak_mib
from tests.support import assets
from xtoken_core.alignment import Alignment, align, align_rows
from xtoken_core.tokenization import TokenTable, encode, normalize_for

PAIRS = (
    *("llama3:qwen3", "llama3:gemma3", "llama3:o200k", "qwen3:mistral", "smollm2:gemma3", "llama2:llama3"),
    *("mistral:gemma3", "tekken:deepseek", "gpt2:qwen3", "claude:gemma3"),
)
ROW = 2000  # student tokens of a row when timing


def documents(paths: list[Path], megabytes: float) -> Iterator[tuple[str, str]]:
    """Name and text of each document, up to so many bytes in all, and the generated ones."""
    files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if f.is_file()]
    if not paths:
        files = [p for p in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")) if "site-packages" not in p.parts]
    left = megabytes * 1e6
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        left -= len(text.encode())
        if left < 0:
            break
        yield file.name, text
    yield "generated", generated()


def generated(words: int = 40_000) -> str:
    """Seeded words of many scripts, emoji sequences and rare white space, half a megabyte or so."""
    rng = random.Random(0)
    blocks = [(0x41, 0x7E), (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x621, 0x64A), (0x905, 0x939)]
    blocks += [(0xE01, 0xE3A), (0x3041, 0x3096), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F), (0x10000, 0x100FA)]
    emoji = ["👩\u200d👩\u200d👧", "🇯🇵", "👍🏽", "🫠", "1\ufe0f\u20e3", "🏳\ufe0f\u200d🌈"]
    spaces = [" "] * 12 + ["  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "      "]

    def word() -> str:
        kind = rng.random()
        if kind < 0.1:
            return rng.choice(emoji)
        if kind < 0.2:
            return str(rng.randrange(10 ** rng.randrange(1, 9)))
        low, high = rng.choice(blocks)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 9)))

    return "".join(word() + rng.choice(spaces) for _ in range(words))


def walk(student: list[int], teacher: list[int]) -> tuple[list[int], list[int]]:
    """The plain Python algorithm: chunk of each token, from the byte lengths of both sides."""
    of_student, of_teacher = [], []
    i = j = at = to = chunk = 0
    while i < len(student) or j < len(teacher):
        if at <= to:
            at += student[i]
            of_student.append(chunk)
            i += 1
        else:
            to += teacher[j]
            of_teacher.append(chunk)
            j += 1
        chunk += at == to
    return of_student, of_teacher


def chunk_texts(ids: np.ndarray, chunks: np.ndarray, table: TokenTable, extra: int) -> list[bytes]:
    """Bytes of each chunk; `extra` bytes in front were added by the tokenizer."""
    inside = chunks >= 0
    ends = np.cumsum(table.lengths[ids[inside]])[np.flatnonzero(np.diff(chunks[inside], append=-1))].tolist()
    text = table.decode(ids[inside])
    return [text[a:b] for a, b in zip([extra, *ends[:-1]], ends)]


def examine(text: str, ids: list[np.ndarray], tables: list[TokenTable], found: Counter) -> Alignment | None:
    """Aligns one document and counts what came of it; None if it was refused."""
    try:
        result = align(*ids, *tables)
    except ValueError:
        found["refused"] += 1
        return None
    sides = []
    for i, chunks, table in zip(ids, (result.student_chunk_id, result.teacher_chunk_id), tables):
        extra = int(table.dummy_prefix and len(i) and int(table.lengths[i].sum()) > len(table.normalize(text).encode()))
        sides.append(chunk_texts(i, chunks, table, extra))
    equal = np.fromiter((a == b for a, b in zip(*sides)), bool, result.num_chunks)
    sizes = [np.bincount(c[c >= 0], minlength=result.num_chunks) for c in (result.student_chunk_id, result.teacher_chunk_id)]
    found["chunks"] += result.num_chunks
    found["one_to_one"] += int(((sizes[0] == 1) & (sizes[1] == 1)).sum())
    found["exact"] += int(result.exact.sum())
    found["wrongly_exact"] += int((result.exact & ~equal).sum())
    found["inexact_documents"] += int(not result.exact.all())
    found["tokens_outside"] += int((result.student_chunk_id < 0).sum() + (result.teacher_chunk_id < 0).sum())
    return result


def rows(text: str, toks: list[Any], tables: list[TokenTable], tokens: int) -> Iterator[list[np.ndarray]]:
    """Both sides of the pieces of a text that come to about `ROW` student tokens each, of `tokens` in all."""
    step = len(text) * ROW // tokens
    pieces = [normalize_for(text[i : i + step], tables) for i in range(0, len(text) - step, step)]
    for pair in zip(*(encode(tok, pieces) for tok in toks)):
        yield [np.array(ids, dtype=np.int64) for ids in pair]


def seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of this thread, the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.thread_time()
        call()
        best = min(best, time.thread_time() - start)
    return best


def speed(sample: list[list[np.ndarray]], tables: list[TokenTable]) -> dict[str, float]:
    """Million student tokens a second: one row at a time, 32 rows at a time, and the plain walk."""

    def lengths(pair: list[np.ndarray]) -> list[list[int]]:
        sides = [[len(table[i]) for i in ids] for ids, table in zip(pair, tables)]
        added = sum(sides[0]) - sum(sides[1])  # a space that one tokenizer put in front
        sides[0][0] -= max(added, 0)
        sides[1][0] += min(added, 0)
        return sides

    looked_up = [lengths(pair) for pair in sample]
    batches = [sample[i : i + 32] for i in range(0, len(sample), 32)]
    tokens = sum(len(student) for student, _ in sample)
    times = {
        "align": seconds(lambda: [align(*pair, *tables) for pair in sample]),
        "align_rows": seconds(lambda: [align_rows(*zip(*batch), *tables) for batch in batches]),
        "walk": seconds(lambda: [walk(*sides) for sides in looked_up]),
        "walk_with_lookup": seconds(lambda: [walk(*lengths(pair)) for pair in sample]),
    }
    return {name: round(tokens / t / 1e6, 2) for name, t in times.items()}


def run_pair(pair: str, corpus: list[tuple[str, str]]) -> dict[str, Any]:
    """The record of one pair."""
    names = pair.split(":")
    toks, tables = [assets.tokenizer(n) for n in names], [assets.table(n) for n in names]
    counts: dict[str, Counter] = {"normalized": Counter(), "as_it_comes": Counter()}
    sizes, sample, unequal = Counter(), [], []

    def each() -> None:
        for name, raw in corpus:
            text = normalize_for(raw, tables)
            ids = [np.array(encode(tok, [text])[0], dtype=np.int64) for tok in toks]
            sizes.update(documents=1, bytes=len(text.encode()), student_tokens=len(ids[0]), teacher_tokens=len(ids[1]))
            result = examine(text, ids, tables, counts["normalized"])
            if result is None or not result.exact.all():
                unequal.append(name)
            elif len(sample) < 256 and len(ids[0]) > ROW:
                sample.extend(rows(text, toks, tables, len(ids[0])))
            if text != raw:
                sizes["normalized_documents"] += 1
                ids = [np.array(encode(tok, [raw])[0], dtype=np.int64) for tok in toks]
                examine(raw, ids, tables, counts["as_it_comes"])

    memory = peak_mib(each)
    found, rates = counts["normalized"], speed(sample[:256], tables)
    return {
        "student": names[0],
        "teacher": names[1],
        **sizes,
        "chunks": found["chunks"],
        "share_one_to_one": round(found["one_to_one"] / found["chunks"], 4),
        "wrongly_exact": found["wrongly_exact"],
        "not_aligned_exactly": unequal,
        "as_it_comes": dict(counts["as_it_comes"]),
        "million_student_tokens_per_second": rates,
        "speedup_over_walk": round(max(rates["align"], rates["align_rows"]) / rates["walk"], 1),
        "speedup_over_walk_with_lookup": round(max(rates["align"], rates["align_rows"]) / rates["walk_with_lookup"], 1),
        "peak_mib": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="files and folders, one document a file")
    parser.add_argument("--pairs", nargs="*", default=PAIRS, help=f"student:teacher, of {', '.join(assets.SOURCES)}")
    parser.add_argument("--megabytes", type=float, default=4.0, help="how much of the texts to read")
    options = parser.parse_args()
    corpus = list(documents(options.texts, options.megabytes))
    records = []
    for pair in options.pairs:
        records.append(run_pair(pair, corpus))
        print(json.dumps(records[-1], ensure_ascii=False), flush=True)
    summary = {
        "summary": "alignment",
        "pairs": len(records),
        "megabytes": round(sum(len(text.encode()) for _, text in corpus) / 1e6, 2),
        "chunks": sum(r["chunks"] for r in records),
        "wrongly_exact": sum(r["wrongly_exact"] + r["as_it_comes"].get("wrongly_exact", 0) for r in records),
        "million_student_tokens_per_second": [
            min(r["million_student_tokens_per_second"]["align"] for r in records),
            max(r["million_student_tokens_per_second"]["align_rows"] for r in records),
        ],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
