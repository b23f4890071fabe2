"""Batches of rows, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtoken_core.data.rows import Row, teacher_column
from xtoken_core.errors import InputError
from xtoken_core.results.rows import RowsRecord
from xtoken_core.spec import DistillationSpec

Scored = Callable[[Sequence[Row]], Any]
"""From rows that know their place to what stands for a teacher's logits over them."""


@dataclass(frozen=True)
class Packed:
    """What a model reads where that is not the B documents one by one: R rows of L tokens."""

    input_ids: Tensor
    """int64 [R, L]."""
    position_ids: Tensor | None
    """int64 [R, L]: restart with each document, and with the padding; None: a row is a document."""
    gather: Tensor
    """int64 [B, T]: where each token lies in the flattened [R * L]; 0 for padding, and for documents that are not read."""


@dataclass(frozen=True)
class Chunks:
    """How a teacher's tokens and the student's meet, in C chunks a row."""

    student_chunk_id: Tensor
    """int64 [B, T], -1 outside chunks."""
    teacher_chunk_id: Tensor
    """int64 [B, T_t], -1 outside chunks."""
    chunk_valid: Tensor
    """bool [B, C]: the chunk keeps a predictor row on both sides."""
    chunk_exact: Tensor
    """bool [B, C]: its text is equal on both sides."""


@dataclass(frozen=True)
class Side:
    """B rows of T tokens as one tokenizer has them."""

    input_ids: Tensor
    """int64 [B, T]."""
    attention_mask: Tensor
    """int64 [B, T], 1: no padding."""
    token_mask: Tensor
    """int64 [B, T], 1: a target."""
    token_bytes: Tensor
    """int32 [B, T]: bytes of text under each token."""
    packed: Packed | None = None
    chunks: Chunks | None = None
    """None for the student, and so for a teacher with its vocabulary."""

    def model_inputs(self) -> dict[str, Tensor]:
        """What a model reads: `input_ids`, and of packed rows `position_ids`."""
        if self.packed is None:
            return {"input_ids": self.input_ids}
        if self.packed.position_ids is None:
            return {"input_ids": self.packed.input_ids}
        return {"input_ids": self.packed.input_ids, "position_ids": self.packed.position_ids}

    def unpacked(self, tensor: Tensor) -> Tensor:
        """[R, L, ...] of packed rows as [B, T, ...], one document a sample; of unpacked rows as they are. What is of padding, or of
        documents that are not read, is meaningless."""
        return tensor if self.packed is None else tensor.flatten(0, 1)[self.packed.gather]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: the same B documents as the student and each teacher read them."""

    student: Side
    teachers: tuple[Side, ...]
    """In the spec's order. The side of a teacher with the student's vocabulary is `student` itself, where it teaches all samples."""
    sample_mask: Tensor
    """float32 [B], 1: the sample counts."""
    taught: tuple[Tensor | None, ...] = ()
    """In the spec's order, bool [B]: the samples of the domains that a teacher teaches; None, where it teaches all. Empty: so do all."""
    scored: tuple[Any, ...] = ()
    """In the spec's order what stands for a teacher's logits, of those that are not run; None for the others."""
    domains: tuple[str, ...] = ()
    """Of each sample."""

    def unheard(self, index: int, domains: Collection[str]) -> Batch:
        """The batch with teacher `index` unheard on the samples of some domains. One that is left with none reads one token."""
        left = torch.tensor([domain not in domains for domain in self.domains], device=self.sample_mask.device)
        if (told := self.taught[index]) is not None:
            left &= told
        sides = list(self.teachers)
        if not left.any():
            sides[index] = _one_token(sides[index])
        return replace(self, teachers=tuple(sides), taught=(*self.taught[:index], left, *self.taught[index + 1 :]))

    @property
    def masks(self) -> tuple[Tensor, Tensor, Tensor]:
        """`input_ids`, `token_mask` and `sample_mask` of the student, as the losses take them."""
        return self.student.input_ids, self.student.token_mask, self.sample_mask

    def teacher_inputs(self, index: int, with_scores: bool) -> dict[str, np.ndarray]:
        """What teacher `index` is sent, as numpy arrays (`teachers.setup.Inputs`)."""
        side = self.teachers[index]
        tensors = side.model_inputs()
        if with_scores:
            tensors["sample_mask"] = self.sample_mask
            tensors |= {f"scored_{name}": getattr(side, name) for name in ("input_ids", "token_mask", "token_bytes")}
            if side.packed is not None:
                tensors["gather"] = side.packed.gather
        return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on a device."""
        return _changed(self, lambda tensor: tensor.to(device, non_blocking=non_blocking), {})

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; torch's DataLoader calls it."""
        return _changed(self, Tensor.pin_memory, {})


def _one_token(side: Side) -> Side:
    """The side of a teacher that teaches nothing of a batch: every rank then runs every micro-batch, as sharded teachers need."""
    ids = side.input_ids[:1, :1]
    positions = None if side.packed is None or side.packed.position_ids is None else torch.zeros_like(ids)
    return replace(side, packed=Packed(ids, positions, torch.zeros_like(side.input_ids)))


def _changed(thing: Any, change: Callable[[Tensor], Tensor], done: dict[int, Any]) -> Any:
    """A nest of frozen dataclasses with every tensor changed, each once: what was one object stays one."""
    if id(thing) not in done:
        if isinstance(thing, Tensor):
            done[id(thing)] = change(thing)
        elif isinstance(thing, tuple):
            done[id(thing)] = tuple(_changed(part, change, done) for part in thing)
        elif is_dataclass(thing) and not isinstance(thing, type):
            parts = {field.name: _changed(getattr(thing, field.name), change, done) for field in fields(thing)}
            done[id(thing)] = replace(thing, **parts)
        else:
            done[id(thing)] = thing
    return done[id(thing)]


class Collator:
    """Pads rows on the right into one `Batch`, as tensors on the CPU.

    No row of logits predicts the first token of a document, so it is not a target; a chunk that has no other token on a side is
    not valid.

    Items of a packed dataset are lists of rows. The batch is then that of all these rows one by one, as losses want it,
    and each side has in `packed` what its model reads.
    """

    def __init__(
        self,
        columns: Sequence[str | None],
        pads: dict[str, int],
        scored: Sequence[Scored | None] = (),
        domains: Sequence[Collection[str] | None] = (),
        sizes: Mapping[str, int] | None = None,
    ):
        """columns: per teacher the prefix of its columns, None with the student's vocabulary. pads: filling id per prefix.

        scored: per teacher what gives its part of `Batch.scored`; None for one that is run. domains: per teacher those that it
        teaches; None: all. sizes: by prefix, how many ids the model knows; rows with another are refused.
        """
        self.sizes = dict(sizes or {})
        self.columns, self.pads, self.scored = tuple(columns), pads, tuple(scored)
        self.domains = tuple(domains) or (None,) * len(self.columns)

    @classmethod
    def for_rows(
        cls,
        spec: DistillationSpec,
        folder: str | Path,
        scored: Sequence[Scored | None] = (),
        sizes: Mapping[str, int] | None = None,
    ) -> Collator:
        """The collator of the rows that `prepare_rows` wrote to `folder`; `sizes`: see the class. Raises InputError for rows of others."""
        pads = RowsRecord.read(Path(folder) / "rows.json").pads
        columns = [teacher_column(teacher.id) if teacher.cross_tokenizer else None for teacher in spec.teachers]
        for column in ("student", *filter(None, columns)):
            if not 0 <= pads.get(column, -1) < 2**31:
                raise InputError(f"{folder}: rows.json: pads: {column}: no id; were these rows prepared for this spec?")
        return cls(columns, pads, scored, [teacher.domains for teacher in spec.teachers], sizes)

    def __call__(self, items: Sequence[Row] | Sequence[list[Row]]) -> Batch:
        """See the class."""
        groups = [item for item in items if isinstance(item, list)]
        rows = [row for item in items for row in (item if isinstance(item, list) else [item])]
        student = self._side(rows, groups, "student")
        teachers = [student if c is None else self._side(rows, groups, c, _chunks(rows, c)) for c in self.columns]
        known = "row" in rows[0]  # validation rows are not scored
        scored = tuple(read and read(rows) for read in self.scored) if known else ()
        taught = tuple(map(partial(_taught, rows), self.domains))
        items = groups or [[row] for row in rows]
        read = (
            side if own is None else self._of_domain(side, items, column or "student", own)
            for side, column, own in zip(teachers, self.columns, taught, strict=True)
        )
        domains = tuple(str(row.get("domain", "")) for row in rows)
        return Batch(student, tuple(read), torch.ones(len(rows)), taught, scored, domains)

    def _side(self, rows: list[Row], groups: list[list[Row]], column: str, chunks: Chunks | None = None) -> Side:
        """What one side reads."""
        targets = _padded([row[f"{column}_mask"] for row in rows], 0)
        targets[:, 0] = 0
        ids = _padded([row[f"{column}_ids"] for row in rows], self.pads[column])
        if ids.min() < 0 or ids.max() >= self.sizes.get(column, 2**31):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(
                f"rows: {column}_ids: {wrong} is not an id of its model, which knows {self.sizes.get(column, 2**31)}"
            )
        return Side(
            input_ids=_tensor(ids),
            attention_mask=_tensor(_padded([np.ones_like(row[f"{column}_ids"]) for row in rows], 0)),
            token_mask=_tensor(targets),
            token_bytes=_tensor(_padded([row[f"{column}_bytes"] for row in rows], 0, np.int32)),
            packed=self._packed(groups, column) if groups else None,
            chunks=chunks,
        )

    def _of_domain(self, side: Side, groups: list[list[Row]], column: str, taught: Tensor) -> Side:
        """A teacher's side with only those documents in what the teacher reads that it teaches [B]; of none at all it reads one token."""
        if not taught.any():
            return _one_token(side)
        flags = iter(taught.tolist())
        kept = [[row for row in group if next(flags)] for group in groups]
        packed = self._packed([group for group in kept if group], column)
        gather = torch.zeros_like(side.input_ids)
        gather[taught, : packed.gather.shape[1]] = packed.gather
        positions = None if side.packed is None else packed.position_ids
        return replace(side, packed=Packed(packed.input_ids, positions, gather))

    def _packed(self, groups: list[list[Row]], column: str) -> Packed:
        ids = [[row[f"{column}_ids"] for row in group] for group in groups]
        lengths = [[len(i) for i in group] for group in ids]
        width = max(map(sum, lengths))
        positions = [[np.arange(n) for n in [*group, width - sum(group)]] for group in lengths]
        starts = [r * width + start for r, group in enumerate(lengths) for start in np.cumsum([0, *group[:-1]])]
        gather = [start + np.arange(n) for start, n in zip(starts, (n for group in lengths for n in group))]
        return Packed(
            input_ids=_tensor(_padded([np.concatenate(group) for group in ids], self.pads[column])),
            position_ids=_tensor(_padded([np.concatenate(group) for group in positions], 0)),
            gather=_tensor(_padded(gather, 0)),
        )


def _chunks(rows: list[Row], column: str) -> Chunks:
    """How one teacher's tokens and the student's meet."""
    students = _padded([row[f"{column}_student_chunk_id"] for row in rows], -1)
    teachers = _padded([row[f"{column}_teacher_chunk_id"] for row in rows], -1)
    exact = _padded([row[f"{column}_chunk_exact"] for row in rows], False, bool)
    counts = [len(row[f"{column}_chunk_exact"]) for row in rows]
    valid = _padded([_valid(s, t, n) for s, t, n in zip(students, teachers, counts)], False, bool)
    return Chunks(*map(_tensor, (students, teachers, valid, exact)))


def _taught(rows: list[Row], domains: Collection[str] | None) -> Tensor | None:
    """[B] bool: which rows are of one of the domains; None: all."""
    own = torch.tensor([domains is None or str(row["domain"]) in domains for row in rows])
    return None if own.all() else own


def _valid(student: np.ndarray, teacher: np.ndarray, count: int) -> np.ndarray:
    """[count] bool: the chunks of one document that keep a predictor row on both sides."""
    valid = np.ones(count, bool)
    for ids in (student, teacher):
        predicted = ids[1:]
        found = np.bincount(predicted[predicted >= 0], minlength=count)
        if len(found) > count:
            raise InputError(f"rows: a token belongs to chunk {len(found) - 1} of {count}")
        valid &= found > 0
    return valid


def _padded(rows: Sequence[np.ndarray], fill: int, dtype: type = np.int64) -> np.ndarray:
    """[B, T]: the rows, filled up on the right."""
    out: np.ndarray = np.full((len(rows), max(map(len, rows))), fill, dtype)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)
