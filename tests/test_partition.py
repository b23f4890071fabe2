"""Cells of two vocabularies: on made-up tables, on real tokenizers, stored with W."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support import assets
from tests.support.tiny import tiny_tokenizer
from tests.test_overlap import make_table
from xtoken_core.errors import InputError
from xtoken_core.first_tokens import FirstTokens
from xtoken_core.partition import JOINED_SHARE, LEAST_CASES, Partition, build_partition, join_cells, seen_together, share_apart
from xtoken_core.projection import Projection, build_projection
from xtoken_core.spec import ProjectionSpec
from xtoken_core.tokenization import TokenTable

tokens = st.lists(st.binary(min_size=1, max_size=4), min_size=1, max_size=12, unique=True)


@given(tokens, tokens)
def test_a_cell_is_the_longest_shared_token_that_the_bytes_begin_with(student, teacher):
    cells = build_partition(make_table(student), make_table(teacher))
    shared = set(student) & set(teacher)
    named = {int(cells.student[student.index(token)]): token for token in shared}
    assert sorted(named) == list(range(cells.num_cells)) and len(named) == len(shared)
    for table, side in ((student, cells.student), (teacher, cells.teacher)):
        for token, cell in zip(table, side.tolist(), strict=True):
            prefixes = [token[:n] for n in range(len(token), 0, -1) if token[:n] in shared]
            assert named.get(cell) == (prefixes[0] if prefixes else None)


def test_cells_of_real_vocabularies():
    """Byte-level ones leave no text out; special tokens meet by role."""
    gpt2, llama = assets.table("gpt2"), assets.table("llama3")
    cells = build_partition(gpt2, llama)
    for table, side in ((gpt2, cells.student), (llama, cells.teacher)):
        assert ((side >= 0).numpy() | table.special).all()
    hello = cells.student[gpt2.ids_by_bytes[b" hello"]]
    assert hello == cells.teacher[llama.ids_by_bytes[b" hello"]]
    assert cells.student[gpt2.roles["eos"]] == cells.teacher[llama.roles["eos"]] >= 0


def test_roles_that_one_token_of_the_teacher_fills_share_its_cell():
    """Else the teacher's end of a text would teach the student to begin one, or to end a turn."""
    llama, gpt2 = assets.table("llama3"), assets.table("gpt2")
    end = gpt2.roles["eos"]
    cells = build_partition(llama, replace(gpt2, roles={"bos": end, "eos": end}))
    assert cells.student[llama.roles["eos"]] == cells.student[llama.roles["bos"]] == cells.teacher[end] == cells.num_cells - 1
    assert cells.student[llama.roles["pad"]] == -1
    gemma, qwen = assets.table("gemma3-chat"), assets.table("qwen3-chat")
    gemma = replace(gemma, roles=gemma.roles | {"eos": 1})
    cells = build_partition(gemma, qwen)
    assert cells.student[1] == cells.student[gemma.turn_end] == cells.teacher[qwen.roles["eos"]] >= 0


def test_joined_cells_are_one():
    cells = build_partition(make_table([b"a", b"b", b"c", b"d"]), make_table([b"a", b"b", b"c", b"x"]))
    joined = join_cells(cells, [(0, 2)])
    assert joined.student.tolist() == [0, 1, 0, -1] and joined.teacher.tolist() == [0, 1, 0, -1] and joined.num_cells == 2


CELLS = 6


@st.composite
def partitions(draw):
    """Cells of made-up vocabularies: each has a token on both sides, some tokens are in none."""
    every = list(range(CELLS))
    more = st.lists(st.integers(-1, CELLS - 1), max_size=5)
    student, teacher = (draw(st.permutations(every + draw(more))) for _ in range(2))
    return Partition(torch.tensor(student), torch.tensor(teacher), CELLS)


pairs = st.lists(st.tuples(st.integers(0, CELLS - 1), st.integers(0, CELLS - 1)), max_size=5)


@given(partitions(), pairs, st.randoms(use_true_random=False))
def test_joined_cells_are_a_coarser_partition(cells: Partition, pairs, order: random.Random):
    """A cell goes into one cell, whole, with every cell that a chain of pairs leads to; in whatever order the pairs come, and once."""
    joined = join_cells(cells, pairs)
    of = dict(zip(cells.student.tolist(), joined.student.tolist()))
    for side in ("student", "teacher"):
        assert [of.get(cell, -1) for cell in getattr(cells, side).tolist()] == getattr(joined, side).tolist()
    assert {of[cell] for cell in range(CELLS)} == set(range(joined.num_cells)) and of.get(-1, -1) == -1
    reached = {cell: {cell} for cell in range(CELLS)}
    for _ in range(CELLS):
        for a, b in pairs:
            reached[a] = reached[b] = reached[a] | reached[b]
            for cell in reached[a]:
                reached[cell] = reached[a]
    for a in range(CELLS):
        assert {b for b in range(CELLS) if of[b] == of[a]} == reached[a]
    turned = [pair[:: order.choice((1, -1))] for pair in order.sample(pairs, len(pairs))]
    assert join_cells(cells, turned).digest() == joined.digest()
    assert join_cells(joined, [(of[a], of[b]) for a, b in pairs]).digest() == joined.digest()


@given(partitions(), pairs, st.integers(0, 2**31 - 1))
def test_a_divergence_of_joined_cells_is_never_larger(cells: Partition, pairs, seed):
    """By the data-processing inequality; and of equal probabilities it is zero."""
    numbers = torch.Generator().manual_seed(seed)

    def masses(partition: Partition, side: str, probabilities):
        own = getattr(partition, side)
        found = torch.zeros(partition.num_cells, dtype=torch.float64).index_add(0, own[own >= 0], probabilities[own >= 0])
        return found / found.sum()

    p, q = (torch.rand(len(side), generator=numbers, dtype=torch.float64) + 1e-3 for side in (cells.teacher, cells.student))
    found = []
    for partition in (cells, join_cells(cells, pairs)):
        of_teacher, of_student = masses(partition, "teacher", p), masses(partition, "student", q)
        found.append(float((of_teacher * (of_teacher / of_student).log()).sum()))
        assert abs(float((of_teacher * (of_teacher / of_teacher).log()).sum())) == 0
    assert -1e-12 <= found[1] <= found[0] + 1e-12


firsts = st.lists(st.tuples(st.integers(0, CELLS - 1), st.integers(0, CELLS - 1), st.integers(1, 60)), max_size=12)


@given(partitions(), firsts)
def test_cells_that_text_shows_together(cells: Partition, cases):
    """Those by hand; a single case joins nothing, and what is joined is no more apart."""
    first = FirstTokens.added(FirstTokens(*(np.array([value]) for value in case)) for case in cases)
    seen: Counter = Counter()
    together: Counter = Counter()
    for student, teacher, count in cases:
        own, other = int(cells.student[student]), int(cells.teacher[teacher])
        for cell in {own, other} - {-1}:
            seen[cell] += count
        if own != other and -1 not in (own, other):
            together[tuple(sorted((own, other)))] += count
    expected = [
        pair
        for pair, count in sorted(together.items())
        if count >= LEAST_CASES and count >= JOINED_SHARE * min(seen[cell] for cell in pair)
    ]
    assert seen_together(cells, first) == expected
    everything = sum(count for *_, count in cases)
    assert share_apart(cells, first) == pytest.approx(together.total() / max(everything, 1))
    left = sum(count for pair, count in together.items() if pair not in expected)
    assert share_apart(join_cells(cells, expected), first) <= left / max(everything, 1) + 1e-12


def test_what_is_rare_in_a_large_text_joins_nothing():
    """As many cases join in a small text and not in one so large that they are chance."""
    cells = Partition(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), 3)
    for everything, expected in ((40_000_000, [(0, 1)]), (50_000_000, [])):
        counted = FirstTokens(np.array([0, 2]), np.array([1, 2]), np.array([11, everything]))
        assert seen_together(cells, counted) == expected


def test_cells_are_stored_with_w(tmp_path):
    student, teacher = tiny_tokenizer(400), tiny_tokenizer(500)
    w = build_projection(student, teacher, ProjectionSpec())
    prints = [TokenTable.from_tokenizer(t).fingerprint for t in (student, teacher)]
    w.save(tmp_path / "w.safetensors", *prints)
    read = Projection.load(tmp_path / "w.safetensors", *prints)
    assert read.cells is not None and w.cells is not None and read.cells.num_cells == w.cells.num_cells
    assert torch.equal(read.cells.student, w.cells.student) and torch.equal(read.cells.teacher, w.cells.teacher)
    replace(w, cells=None).save(tmp_path / "without.safetensors", *prints)
    assert Projection.load(tmp_path / "without.safetensors").cells is None


@pytest.mark.parametrize("damage", ["short", "below", "many", "float"])
def test_bad_cells_are_refused(tmp_path, damage):
    w = build_projection(tiny_tokenizer(400), tiny_tokenizer(500), ProjectionSpec())
    path = tmp_path / "w.safetensors"
    w.save(path, "aa", "bb")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    cells = tensors["student_cells"]
    changed = {"short": cells[:-1], "below": cells - 2, "many": cells + 10**6, "float": cells.float()}
    save_file(tensors | {"student_cells": changed[damage].clone()}, path, header)
    with pytest.raises(InputError, match="w.safetensors: .*cells"):
        Projection.load(path)
