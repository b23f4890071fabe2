"""Rows of several prepare tasks, streamed from the store: training begins when the first shard is there."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xtoken_core import storage
from xtoken_core.data.prepare import all_shards, check_statistics, load_rows, statistics_of, training_rows
from xtoken_core.spec import DataSpec

if TYPE_CHECKING:
    from datasets import Dataset


def rows_of_shards(data: DataSpec, folders: Sequence[str]) -> Any:
    """The rows to train on, map-style, of the shards in `folders` (paths or URIs of what prepare wrote).

    Several shards are streamed. With `max_rows` or `packing` they are fetched first: documents are dealt out to the shards in
    turn, so that the first rows of all, and the rows that fill one row together, lie in many shards at once.
    Raises InputError where there is nothing to learn from in all of them.
    """
    shards = [f"{folder}/train" for folder in folders]
    statistics = [statistics_of(shard) for shard in shards]
    check_statistics(all_shards(statistics), "data.train")
    if len(shards) == 1 or data.max_rows is not None or data.packing:
        return training_rows(data, *(storage.local_copy(shard) for shard in shards))
    return StreamedRows(shards, [counted["rows"] for counted in statistics])


class StreamedRows:
    """Map-style rows, shard after shard: one is fetched when it is first asked for, and the one that comes next meanwhile."""

    def __init__(self, shards: Sequence[str], counts: Sequence[int]):
        """shards: paths or URIs; counts: rows in each."""
        self.shards = shards
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self._following: dict[int, int] = {}
        self._fetched: dict[int, Future[Dataset]] = {}
        self._pool = ThreadPoolExecutor(1)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Any:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        rows = self._fetch(shard)
        if shard in self._following:
            self._fetch(self._following[shard])
        return rows.result()[index - int(self.starts[shard])]

    def order(self, generator: torch.Generator) -> Tensor:
        """An epoch's order, int64 [rows]: shards at random, and the rows of each at random, so that shards are needed in turn."""
        visits = torch.randperm(len(self.shards), generator=generator).tolist()
        self._following = dict(zip(visits, visits[1:]))
        parts = []
        for shard in visits:
            start, end = int(self.starts[shard]), int(self.starts[shard + 1])
            parts.append(start + torch.randperm(end - start, generator=generator))
        return torch.cat(parts)

    def _fetch(self, shard: int) -> Future[Dataset]:
        if shard not in self._fetched:
            self._fetched[shard] = self._pool.submit(lambda: load_rows(storage.local_copy(self.shards[shard])))
        return self._fetched[shard]
