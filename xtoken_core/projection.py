"""The projection matrix W: how the tokens of a student's vocabulary read in a teacher's.

Row s holds the teacher ids that spell student token s, with weights that sum to 1. A token that the teacher has byte
for byte is one entry of weight 1; any other is tokenized by the teacher, and piece i of the first `top_k` weighs
0.9 * 0.1**i before normalisation (X-Token, arXiv 2605.21699).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from xtoken_core.errors import InputError
from xtoken_core.partition import Partition, build_partition
from xtoken_core.projection_files import (
    FORMAT,
    FORMAT_VERSION,
    ROW_SUMS,
    checked_cells,
    checked_entries,
    checked_exact,
    read_nemo_rl,
    read_projection,
    rows_sum_to_one,
    vocabulary_size,
)
from xtoken_core.spec import DistillationSpec, ProjectionSpec
from xtoken_core.storage import local_copy
from xtoken_core.tokenization import TokenTable, load_tokenizer, role_pairs
from xtoken_core.tokenizer_parts import bare_tokenizer

T = TypeVar("T")

_FIRST, _DECAY = 0.9, 0.1  # weight of the first piece, and of each next one relative to it


@dataclass(frozen=True, eq=False)
class Projection:
    """W as the entries of its rows. The tensors are kept as they are given."""

    indices: Tensor
    """int64 [V_s, k]: teacher ids; -1 where a row has no further entry."""
    weights: Tensor
    """float [V_s, k]: each row sums to 1, or has no entries; rows of an imported W may have any sum."""
    teacher_vocab_size: int | None = None
    """Ids of the teacher; None: not known."""
    exact: Tensor | None = None
    """bool [V_s]: the teacher has the very token, byte for byte or by role; None: not known."""
    cells: Partition | None = None
    """What partition_kl compares in place of W; None: not known."""
    tables: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What `table` keeps; matrices of the same entries with other weights may share it."""
    _weighted_tables: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def table(self, make: Callable[..., T], *key: Hashable) -> T:
        """`make(self, *key)`, which reads `indices`, `exact` and `cells` only. Made once and kept."""
        return _kept(self.tables, make, self, key)

    def weighted_table(self, make: Callable[..., T], *key: Hashable) -> T:
        """`make(self, *key)`, made once and kept. The tensors may not be changed in place afterwards."""
        return _kept(self._weighted_tables, make, self, key)

    def to(self, device: torch.device | str) -> Projection:
        """The same matrix on another device."""
        exact = None if self.exact is None else self.exact.to(device)
        cells = None if self.cells is None else self.cells.to(device)
        return Projection(self.indices.to(device), self.weights.to(device), self.teacher_vocab_size, exact, cells)

    def save(
        self, path: str | Path, student_fingerprint: str, teacher_fingerprint: str, options: dict[str, Any] | None = None
    ) -> None:
        """Writes a .safetensors file whose header names both vocabularies and the options W was built with."""
        tensors = {"indices": self.indices.to(torch.int32), "weights": self.weights.to(torch.float32)}
        if self.exact is not None:
            tensors["exact"] = self.exact
        if self.cells is not None:
            tensors |= {"student_cells": self.cells.student.to(torch.int32), "teacher_cells": self.cells.teacher.to(torch.int32)}
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "student_fingerprint": student_fingerprint,
            "teacher_fingerprint": teacher_fingerprint,
            "options": json.dumps(options or {}, sort_keys=True),
            ROW_SUMS: "one" if rows_sum_to_one(self.weights) else "any",
        }
        if self.teacher_vocab_size is not None:
            header["teacher_vocab_size"] = str(self.teacher_vocab_size)
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, header)

    @classmethod
    def load(
        cls, path: str | Path, student: TokenTable | str | None = None, teacher: TokenTable | str | None = None
    ) -> Projection:
        """Reads a file that `save` wrote.

        student, teacher: the vocabularies that it has to be for, or their fingerprints. Raises InputError, which names the
        file, if it is damaged, contradicts itself or is for others.
        """
        header, tensors = read_projection(path)
        for side, wanted in (("student", student), ("teacher", teacher)):
            print_ = wanted.fingerprint if isinstance(wanted, TokenTable) else wanted
            found = header.get(f"{side}_fingerprint")
            if print_ is not None and found != print_:
                raise InputError(f"{path}: made for a {side} vocabulary {found}, but this {side}'s is {print_}")
        rows = len(student) if isinstance(student, TokenTable) else None
        size = vocabulary_size(header, path, len(teacher) if isinstance(teacher, TokenTable) else None)
        indices, weights = checked_entries(tensors.get("indices"), tensors.get("weights"), rows, size, path)
        if header.get(ROW_SUMS, "one") == "one" and not rows_sum_to_one(weights):
            raise InputError(f"{path}: rows of weights that sum neither to 1 nor to 0")
        exact = checked_exact(tensors.get("exact"), indices, path)
        if exact is not None and isinstance(student, TokenTable) and isinstance(teacher, TokenTable):
            told = exact.nonzero()[:, 0].numpy()
            if (student.objects[told] != teacher.objects[indices[told, 0].numpy()]).any():
                raise InputError(f"{path}: rows that are exact, with another token of the teacher")
        return cls(indices, weights, size, exact, checked_cells(tensors, len(indices), size, path))

    @classmethod
    def from_nemo_rl(
        cls, path: str | Path, student_vocab_size: int | None = None, teacher_vocab_size: int | None = None
    ) -> Projection:
        """Imports NeMo-RL's .pt: a dict of `indices` and `likelihoods` [V_s, k], or a dict of (student, teacher) -> count.

        Weights stay as they are, counts too, since NeMo-RL's losses take them so. Entries of weight 0 go, and what went is
        logged. The sizes, where given, bound the ids and fix the number of rows. Raises InputError for a file that is not
        such a dict, or has bad ids or weights.
        """
        return cls(*read_nemo_rl(path, student_vocab_size, teacher_vocab_size), teacher_vocab_size)

    def to_nemo_rl(self, path: str | Path) -> None:
        """Writes NeMo-RL's dense form: torch.save of `indices` int64 and `likelihoods` float32, both [V_s, k]."""
        torch.save({"indices": self.indices.cpu(), "likelihoods": self.weights.detach().float().cpu()}, path)


def _kept(tables: dict[Any, Any], make: Callable[..., T], projection: Projection, key: tuple[Hashable, ...]) -> T:
    if (make, *key) not in tables:
        with torch.inference_mode(False):  # a table made while a model is evaluated serves training too
            tables[make, *key] = make(projection, *key)
    return tables[make, *key]


def build_projection(
    student_tok: PreTrainedTokenizerFast, teacher_tok: PreTrainedTokenizerFast, spec: ProjectionSpec
) -> Projection:
    """Builds W for a pair of tokenizers, with `exact` and `cells`.

    A special token reads as the one that `role_pairs` gives: of the first role that it fills on both sides; without one
    its row is empty. So is the row of a byte-fallback or added token that repeats an ordinary one.
    """
    student, teacher = TokenTable.from_tokenizer(student_tok), TokenTable.from_tokenizer(teacher_tok)
    pieces = spell_vocabulary(student, teacher, teacher_tok)
    exact = torch.tensor([len(row) == 1 for row in pieces], dtype=torch.bool)
    entries = [_weigh(row[: spec.top_k]) for row in pieces]
    if spec.reverse_pass:
        for index, row in enumerate(spell_vocabulary(teacher, student, student_tok)):
            for piece, weight in _weigh(row[: spec.top_k]).items():
                entries[piece][index] = entries[piece].get(index, 0.0) + weight
        entries = [dict(sorted(row.items(), key=lambda e: -e[1])[: spec.top_k]) for row in entries]
    for own, other in role_pairs(student, teacher).items():
        entries[own] = {other: 1.0}
        exact[own] = True
    indices, weights = _padded(entries, spec.top_k)
    return Projection(indices, weights, len(teacher), exact, build_partition(student, teacher))


def write_projection(spec: DistillationSpec, teacher_id: str, folder: str | Path) -> MadeProjection:
    """Builds (or, with `projection.uri`, fetches and checks) W of one teacher, as `folder`/projection.safetensors. Raises InputError."""
    made = make_projection(spec, teacher_id)
    made.save(Path(folder) / "projection.safetensors")
    return made


@dataclass(frozen=True)
class MadeProjection:
    """W of a teacher with the two vocabularies that it is for."""

    projection: Projection
    student: TokenTable
    teacher: TokenTable
    options: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes the file that `Projection.load` reads."""
        self.projection.save(path, self.student.fingerprint, self.teacher.fingerprint, self.options)


def make_projection(spec: DistillationSpec, teacher_id: str) -> MadeProjection:
    """W of one teacher as its spec asks for it: built, or fetched and checked. Raises InputError."""
    teacher = next((t for t in spec.teachers if t.id == teacher_id), None)
    options = teacher.projection if teacher is not None else None
    if teacher is None or options is None:
        raise InputError(f"teacher: {teacher_id}: no teacher of the spec that has a projection")
    student, other = (load_tokenizer(side.model, side.tokenizer) for side in (spec.student, teacher))
    table, other_table = TokenTable.from_tokenizer(student), TokenTable.from_tokenizer(other)
    found = build_projection(student, other, options) if options.uri is None else _fetch(options.uri, table, other_table)
    return MadeProjection(found, table, other_table, options.model_dump(mode="json", exclude={"learnable", "learning_rate"}))


def _fetch(uri: str, student: TokenTable, teacher: TokenTable) -> Projection:
    path = local_copy(uri)
    if uri.endswith(".safetensors"):
        found = Projection.load(path, student, teacher)
    else:
        found = Projection.from_nemo_rl(path, len(student), len(teacher))
    return found if found.cells is not None else replace(found, cells=build_partition(student, teacher))


def _weigh(pieces: Sequence[int]) -> dict[int, float]:
    """Pieces in order -> weights, of which a repeated id gets the sum."""
    weights: dict[int, float] = {}
    for i, piece in enumerate(pieces):
        weights[piece] = weights.get(piece, 0.0) + _FIRST * _DECAY**i
    return weights


def _padded(entries: list[dict[int, float]], width: int) -> tuple[Tensor, Tensor]:
    """Rows of entries as int64 indices and float32 weights [V, width], normalised."""
    indices = np.full((len(entries), width), -1, dtype=np.int64)
    weights = np.zeros((len(entries), width))
    for row, entry in enumerate(entries):
        for slot, (index, weight) in enumerate(entry.items()):
            indices[row, slot], weights[row, slot] = index, weight
    total = weights.sum(1, keepdims=True)
    np.divide(weights, total, out=weights, where=total > 0)
    return torch.from_numpy(indices), torch.from_numpy(weights).to(torch.float32)


def spell_vocabulary(source: TokenTable, target: TokenTable, target_tok: PreTrainedTokenizerFast) -> list[list[int]]:
    """For each id of `source` the ids of `target` that spell its bytes; [] for special and repeated tokens, and where
    `target` lacks a byte."""
    known = target.ids_by_bytes
    rows: list[list[int]] = [[] for _ in range(len(source))]
    unknown = []
    for i, token in enumerate(source.tokens):
        if source.special[i] or (not source.ordinary[i] and source.ids_by_bytes[token] != i):
            continue
        if token in known:
            rows[i] = [known[token]]
        else:
            unknown.append(i)
    speller = _Speller(target, target_tok)
    for i, pieces in zip(unknown, speller.spell([source[i] for i in unknown])):
        rows[i] = pieces
    return rows


class _Speller:
    """Spells byte strings in the tokens of one tokenizer: no normaliser, no prefix, and special tokens' names are text."""

    def __init__(self, table: TokenTable, tok: PreTrainedTokenizerFast):
        self.table, self.bare = table, bare_tokenizer(tok)
        backend = tok.backend_tokenizer
        added = {i: t for i, t in backend.get_added_tokens_decoder().items() if not table.special[i]}
        self.bare.add_tokens([AddedToken(t.content, normalized=False) for t in added.values()])
        self.own_id = {self.bare.token_to_id(t.content): i for i, t in added.items()}

    def spell(self, texts: list[bytes]) -> list[list[int]]:
        """The pieces of each byte string; [] where the vocabulary lacks one of its bytes."""
        pieces: list[list[int]] = [[] for _ in texts]
        readable = {i: text for i, raw in enumerate(texts) if (text := _decode(raw)) is not None}
        for i, found in zip(readable, self._encode(readable.values())):
            pieces[i] = found
        for i, raw in enumerate(texts):
            if self.table.decode(pieces[i]) != raw:
                pieces[i] = self._spell_bytes(raw)
        return pieces

    def _encode(self, texts: Iterable[str]) -> list[list[int]]:
        if not self.table.byte_level:
            texts = [text.replace(" ", "\u2581") for text in texts]
        return [
            [self.own_id.get(i, i) for i in e.ids] for e in self.bare.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def _spell_bytes(self, text: bytes) -> list[int]:
        """The longest token at each place, down to single bytes, for what is no valid UTF-8 or came out changed."""
        known, pieces, start = self.table.ids_by_bytes, [], 0
        while start < len(text):
            end = next((e for e in range(len(text), start, -1) if text[start:e] in known), None)
            if end is None:
                return []
            pieces.append(known[text[start:end]])
            start = end
        return pieces


def _decode(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None
