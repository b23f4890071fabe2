"""How much text it takes to join cells: `python -m tests.benchmarks.quality.joined DATA [--teacher N]`

DATA is what `python -m tests.benchmarks.quality prepare` made. A line of JSON for each number of training rows, spread evenly over all, and
each least number of cases in which a pair is seen: pairs that are joined, cells that are left, the share of them that the other rows bear
out (5 % there too), and of every text the share of chunks whose first tokens lie in different cells.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from unittest import mock

import numpy as np

from xtoken_core import partition
from xtoken_core.first_tokens import FirstTokenCounter, FirstTokens, first_of_chunks
from xtoken_core.partition import join_cells, seen_together, share_apart
from xtoken_core.projection import Projection

ROWS = (100, 400, 1600, 6400, 12800)
LEAST = (1, 2, 3, 5)


def first_tokens(arrays: dict[str, np.ndarray], teacher: int, rows: np.ndarray) -> FirstTokens:
    """Of some rows of a file that `rows.prepare` wrote."""
    counter = FirstTokenCounter()
    sides = ("input_ids", "student_chunk_id"), (f"{teacher}.input_ids", "teacher_chunk_id")
    columns = [(arrays[ids], arrays[f"{teacher}.{chunk_id}"]) for ids, chunk_id in sides]
    for row in rows:
        exact = arrays[f"{teacher}.chunk_exact"][row]
        counter.add(*(first_of_chunks(ids[row], chunk_id[row], exact) for ids, chunk_id in columns))
    return counter.total()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.quality.joined")
    parser.add_argument("data", type=Path)
    parser.add_argument("--teacher", type=int, default=0)
    options = parser.parse_args()
    texts = {path.stem: dict(np.load(path)) for path in sorted(options.data.glob("*.npz"))}
    train = texts.pop("train")
    count = len(train["input_ids"])
    held_out = {
        name: first_tokens(arrays, options.teacher, np.arange(len(arrays["input_ids"]))) for name, arrays in texts.items()
    }
    cells = Projection.load(options.data / f"w-{options.teacher}.safetensors").cells
    assert cells is not None
    before = {name: round(share_apart(cells, first), 4) for name, first in held_out.items()}
    print(json.dumps({"rows": 0, "cells": cells.num_cells, "apart": before}))
    for taken in (*(rows for rows in ROWS if rows < count), count):
        chosen = np.linspace(0, count, taken, endpoint=False).astype(int)
        start = time.perf_counter()
        first = first_tokens(train, options.teacher, chosen)
        seconds = time.perf_counter() - start
        others = first_tokens(train, options.teacher, np.setdiff1d(np.arange(count), chosen))
        with mock.patch.object(partition, "LEAST_CASES", 1):
            elsewhere = set(seen_together(cells, others))
        for least in LEAST:
            with mock.patch.object(partition, "LEAST_CASES", least):
                pairs = seen_together(cells, first)
            joined = join_cells(cells, pairs)
            found = {"rows": taken, "chunks": int(first.count.sum()), "seconds": round(seconds, 2), "least": least}
            found |= {"pairs": len(pairs), "cells": joined.num_cells}
            if taken < count:
                found["borne_out"] = round(len(elsewhere.intersection(pairs)) / max(len(pairs), 1), 3)
            found["apart_own"] = round(share_apart(joined, first), 4)
            print(json.dumps(found | {"apart": {name: round(share_apart(joined, one), 4) for name, one in held_out.items()}}))


if __name__ == "__main__":
    main()
