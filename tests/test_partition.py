"""Cells of two vocabularies: on made-up tables, on real tokenizers, stored with W."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.benchmarks.quality.prepare import join_cells
from tests.support import assets
from tests.support.tiny import tiny_tokenizer
from tests.test_overlap import make_table
from xtoken_core.errors import InputError
from xtoken_core.partition import build_partition
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
