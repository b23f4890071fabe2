"""Prepared rows as training reads them: of one shard or many, packed, in the order of each epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from xtoken_core import storage
from xtoken_core.data.mixture import Mixture
from xtoken_core.data.rows import Row
from xtoken_core.data.statistics import all_shards, check_statistics, statistics_of
from xtoken_core.errors import InputError, in_one_line
from xtoken_core.spec import DataSpec

if TYPE_CHECKING:
    from datasets import Dataset


Check = Callable[[int, "Dataset"], None]
"""Looks at the rows of a shard, and its number, when they have been read. Raises InputError."""


def rows_of_shards(data: DataSpec, folders: Sequence[str], check: Check | None = None) -> Any:
    """The rows to train on, map-style, of the shards in `folders` (paths or URIs of what prepare wrote).

    Several shards are streamed. With `max_rows`, `packing` or weights they are fetched first: documents are dealt out to the
    shards in turn, so that the first rows of all, those that fill one row together, and those of a part lie in many at once.
    Raises InputError for another number of folders than of shards, and where there is nothing to learn from in all of them.
    check: see `load_rows`.
    """
    if len(folders) != data.shards:
        raise InputError(f"rows: {len(folders)} folders were given for {data.shards} shards (data.shards)")
    shards = [f"{folder}/train" for folder in folders]
    statistics = [statistics_of(shard) for shard in shards]
    check_statistics(all_shards(statistics), "data.train", domains=data.expected_domains)
    if len(shards) == 1 or data.max_rows is not None or data.packing or data.weighted:
        return training_rows(data, *(storage.local_copy(shard) for shard in shards), check=check)
    return StreamedRows(shards, [counted.rows for counted in statistics], check)


class StreamedRows:
    """Map-style rows, shard after shard: one is fetched when it is first asked for, and the one that comes next meanwhile.

    Training begins when the first shard is there.
    """

    def __init__(self, shards: Sequence[str], counts: Sequence[int], check: Check | None):
        """shards: paths or URIs; counts: rows in each; check: see `load_rows`."""
        self.shards, self.check = shards, check
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
            self._fetched[shard] = self._pool.submit(self._load, shard)
        return self._fetched[shard]

    def _load(self, shard: int) -> Dataset:
        return load_rows(storage.local_copy(self.shards[shard]), first=shard, check=self.check)


def row_budget(data: DataSpec) -> int:
    """Rows that `data.max_rows` leaves; with packing, the tokens that would fill them."""
    return (data.max_rows or 0) * (data.max_length if data.packing else 1)


def load_rows(*folders: str | Path, first: int = 0, check: Check | None = None) -> Dataset:
    """The rows that `prepare_rows` wrote, memory-mapped, as numpy arrays; those of several shards in document order.

    first: number of the first folder's shard. check: looks at every shard; each row then knows its `shard`, and which `row` of it it is.
    """
    import datasets

    parts = [_read_arrow(Path(folder) / "rows.arrow") for folder in folders]
    if check is not None:
        for number, part in enumerate(parts):
            check(first + number, part)
            places = {"shard": np.full(len(part), first + number), "row": np.arange(len(part))}
            parts[number] = datasets.concatenate_datasets([part, datasets.Dataset.from_dict(places)], axis=1)
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if len(parts) > 1:
        rows = rows.select(np.argsort(rows.with_format("numpy")["document"][:], kind="stable"))
    return rows.with_format("numpy")


def _read_arrow(path: Path) -> Dataset:
    """One memory-mapped file of rows, its structure checked. Raises InputError."""
    import datasets
    import pyarrow as pa

    try:
        rows = datasets.Dataset.from_file(str(path))
        rows.data.table.validate(full=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: no rows that prepare wrote") from None
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError, MemoryError) as e:
        raise InputError(f"{path}: rows that cannot be read: {in_one_line(e)}") from None
    return rows


def training_rows(data: DataSpec, *folders: str | Path, check: Check | None = None) -> Dataset | PackedRows | Mixture:
    """The rows to train on: of all shards, no more than `data.max_rows`, packed if `data.packing` says so, and by weights.

    check: see `load_rows`.
    """
    rows = load_rows(*folders, check=check)
    if data.max_rows is not None:
        cost = row_lengths(rows, "student") if data.packing else np.ones(len(rows), np.int64)
        rows = rows.select(range(int(np.count_nonzero(np.cumsum(cost) - cost < row_budget(data)))))
    parts = np.asarray(rows["part"][:]) if data.weighted else np.zeros(len(rows), np.int64)
    items: Any = rows
    if data.packing:  # rows of one part only share a row of the batch
        columns = [name.removesuffix("_ids") for name in rows.column_names if name.endswith("_ids")]
        lengths = np.stack([row_lengths(rows, column) for column in columns], axis=1)
        plan: list[list[int]] = []
        for part in np.unique(parts):
            members = np.flatnonzero(parts == part)
            plan += [members[fitting].tolist() for fitting in pack(lengths[members], data.max_length)]
        items = PackedRows(rows, plan[: data.max_rows])
        parts = parts[[fitting[0] for fitting in plan]]
    if not data.weighted:
        return items
    return Mixture(items, parts, [part.weight or 0.0 for part in data.parts])


def row_lengths(rows: Dataset, column: str) -> np.ndarray:
    """[rows] int64: tokens of each row on one side, read off Arrow's offsets."""
    import pyarrow.compute as pc

    table = rows.select_columns([f"{column}_ids"]).with_format("arrow")[:]
    return pc.list_value_length(table.column(0)).to_numpy().astype(np.int64)


class PackedRows:
    """A map-style dataset whose items are lists of rows that share a row of the batch."""

    def __init__(self, rows: Dataset, plan: Sequence[Sequence[int]]):
        self.rows, self.plan = rows, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[Row]:
        return [self.rows[i] for i in self.plan[index]]


def pack(lengths: np.ndarray, limit: int, open_bins: int = 64) -> list[list[int]]:
    """Which rows go together: first fit, among the last few bins opened.

    lengths: [rows, sides]. No side of a bin exceeds `limit`. Returns the rows' indices by bin, bins in order of opening.
    """
    bins: list[list[int]] = []
    free = np.zeros((open_bins, lengths.shape[1]), np.int64)  # a ring: bin b has its space at b % open_bins
    for row, need in enumerate(lengths):
        recent = np.arange(max(0, len(bins) - open_bins), len(bins))
        fitting = recent[(free[recent % open_bins] >= need).all(axis=1)]
        if len(fitting):
            chosen = int(fitting[0])
        else:
            chosen = len(bins)
            bins.append([])
            free[chosen % open_bins] = limit
        bins[chosen].append(row)
        free[chosen % open_bins] -= need
    return bins


class Shuffled(torch.utils.data.Dataset):
    """`length` items of a dataset, in a new order every epoch; the order depends on the seed alone, not on ranks or batches."""

    def __init__(self, rows: Any, length: int, seed: int):
        self.rows, self.length, self.seed = rows, length, seed
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        epoch, position = divmod(index, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return self.rows[int(self._order[position])]

    def _order_of(self, epoch: int) -> Tensor:
        if isinstance(self.rows, Mixture):
            return torch.from_numpy(self.rows.order(self.seed, epoch))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if isinstance(self.rows, StreamedRows):
            return self.rows.order(generator)
        return torch.randperm(len(self.rows), generator=generator)
