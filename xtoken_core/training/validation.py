"""Bits per byte of the validation rows while the student trains: by domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from xtoken_core.data.batch import Batch, Side
from xtoken_core.errors import InputError
from xtoken_core.losses import StepTotals, batch_counts
from xtoken_core.training.step import over_ranks
from xtoken_core.training.student import MicroBatch, Student


def of_text(side: Side) -> Side:
    """A side with those targets only that stand for text: what ends a turn or calls a tool is a target, and has no bytes."""
    return replace(side, token_mask=side.token_mask * (side.token_bytes > 0))


@dataclass(frozen=True)
class HeldOut:
    """This rank's share of the validation rows, by domain."""

    groups: Mapping[str, Any]
    """Map-style rows: of each domain of the training data that some are of, and as `` those of none."""
    domains: Collection[str]
    """Of the training data; `` is that of parts without a name, for which all validation rows speak."""
    collate: Callable[[Sequence[Any]], Batch]
    size: int
    """Rows of a batch."""
    rank: int
    ranks: int

    @classmethod
    def of(
        cls, rows: Any, domains: Collection[str], collate: Callable[[Sequence[Any]], Batch], args: TrainingArguments
    ) -> HeldOut:
        """Prepared rows (a `datasets.Dataset`) by their domain."""
        places: dict[str, list[int]] = {}
        for place, domain in enumerate(rows["domain"]):
            places.setdefault(domain if domain in domains else "", []).append(place)
        groups = {domain: rows.select(own) for domain, own in sorted(places.items())}
        return cls(groups, domains, collate, args.per_device_train_batch_size, args.process_index, args.world_size)

    def batches(self, domain: str) -> Iterator[Batch]:
        """Batches of a domain's rows. Every rank gets as many, since FSDP's forward is collective: some may be masked out."""
        rows, size = self.groups[domain], self.size
        count = math.ceil(len(rows) / size)
        for n in range(self.rank, math.ceil(count / self.ranks) * self.ranks, self.ranks):
            first = min(n, count - 1) * size
            batch = self.collate([rows[i] for i in range(first, min(first + size, len(rows)))])
            yield batch if n < count else replace(batch, sample_mask=torch.zeros_like(batch.sample_mask))

    def by_group(self, sums: Mapping[str, Sequence[float]]) -> Tensor:
        """[G, n] float64: sums [n] by domain of the rows, added up by group."""
        groups = list(self.groups)
        found = torch.zeros(len(groups), len(next(iter(sums.values()))), dtype=torch.float64)
        for domain, own in sums.items():
            found[groups.index(domain if domain in groups else "")] += torch.tensor(own, dtype=torch.float64)
        return found

    def bits_per_byte(self, nats: Tensor, num_bytes: Tensor) -> dict[str, float]:
        """Of each domain of the training data that has rows with bytes here, from sums by group [G]."""
        own = {domain: (n, b) for domain, n, b in zip(self.groups, nats.tolist(), num_bytes.tolist()) if domain}
        whole = {"": (float(nats.sum()), float(num_bytes.sum()) if bool(num_bytes.all()) else 0.0)}
        return {d: n / math.log(2) / b for d, (n, b) in (own | whole).items() if d in self.domains and b}


@dataclass(frozen=True)
class Validation:
    """One validation of the student."""

    bits_per_byte: float
    accuracy: float
    """Share of these targets that are the student's first choice."""
    domains: dict[str, float]
    """Bits per byte by domain of the training data."""

    @property
    def named(self) -> dict[str, float]:
        """Bits per byte of the domains that have a name."""
        return {domain: bits for domain, bits in self.domains.items() if domain}


@torch.no_grad()
def validate(student: Student, held_out: HeldOut, device: torch.device) -> Validation:
    """CE of the targets that stand for text over their bytes, and how many are the first choice; over all ranks, which all call this.

    Raises InputError where there is none.
    """
    sums = torch.zeros(len(held_out.groups), 4, dtype=torch.float64, device=device)
    for own, domain in zip(sums, held_out.groups):
        for batch in held_out.batches(domain):
            batch = replace(batch, student=of_text(batch.student), teachers=()).to(device)
            counts = batch_counts(*batch.masks, [], student.loss)
            out = student(MicroBatch(batch, {}), StepTotals.from_sums(counts, [], student.loss), with_loss=False)
            targets = batch.student.token_mask.bool() & batch.sample_mask.bool()[:, None]
            num_bytes = (batch.student.token_bytes * targets)[:, 1:].sum().double()
            own += torch.cat([out["sums"][:2], counts[:1], num_bytes[None]])
    sums = over_ranks(sums, device)
    ce, correct, tokens, num_bytes = sums.sum(0).tolist()
    if not num_bytes:
        raise InputError("data.validation: none of its targets stands for text")
    return Validation(ce / math.log(2) / num_bytes, correct / tokens, held_out.bits_per_byte(sums[:, 0], sums[:, 3]))
