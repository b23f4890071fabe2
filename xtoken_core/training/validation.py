"""Bits per byte of the validation rows while the student trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from xtoken_core.data.batch import Batch
from xtoken_core.losses import StepTotals, batch_counts
from xtoken_core.training.step import over_ranks
from xtoken_core.training.student import MicroBatch, Student


@dataclass(frozen=True)
class Validation:
    """One validation of the student."""

    bits_per_byte: float
    accuracy: float
    """Share of targets that are the student's first choice."""


def shares(rows: Any, size: int, rank: int, ranks: int, collate: Callable[[Sequence[Any]], Batch]) -> Iterator[Batch]:
    """This rank's batches of `size` rows, without teachers.

    Every rank gets as many, since FSDP's forward is collective: some may be masked out.
    """
    count = math.ceil(len(rows) / size)
    for n in range(rank, math.ceil(count / ranks) * ranks, ranks):
        first = min(n, count - 1) * size
        batch = replace(collate([rows[i] for i in range(first, min(first + size, len(rows)))]), teachers=())
        yield batch if n < count else replace(batch, sample_mask=torch.zeros_like(batch.sample_mask))


@torch.no_grad()
def validate(student: Student, batches: Iterable[Batch], device: torch.device) -> Validation:
    """CE of the targets over the targets' bytes, and how many are the first choice; over all ranks, which all call this."""
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in (batch.to(device) for batch in batches):
        counts = batch_counts(*batch.masks, [], student.loss)
        out = student(MicroBatch(batch, {}), StepTotals.from_sums(counts, [], student.loss), with_loss=False)
        targets = batch.student.token_mask.bool() & batch.sample_mask.bool()[:, None]
        num_bytes = (batch.student.token_bytes * targets)[:, 1:].sum().double()
        sums += torch.cat([out["sums"][:2], counts[:1], num_bytes[None]])
    ce, correct, tokens, num_bytes = over_ranks(sums, device).tolist()
    return Validation(ce / math.log(2) / num_bytes, correct / tokens)
