"""First tokens of chunks: counted as by hand, in whatever order and however split, stored, and refused where they are damaged."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from xtoken_core import first_tokens
from xtoken_core.errors import InputError
from xtoken_core.first_tokens import (
    FORMAT,
    FirstTokenCounter,
    FirstTokens,
    first_of_chunks,
    read_first_tokens,
    write_first_tokens,
)


@st.composite
def sides(draw):
    """A row of both sides, as lists of (id, chunk), and which of its chunks are exact: some have tokens on one side only."""
    exact = draw(st.lists(st.booleans(), min_size=1, max_size=5))
    chunks = st.lists(st.integers(-1, len(exact) - 1), max_size=12).map(sorted)
    numbers = [draw(chunks) for _ in range(2)]
    return [[(draw(st.integers(0, 3)), chunk) for chunk in side] for side in numbers], exact


def by_hand(rows):
    counted: Counter = Counter()
    for (student, teacher), exact in rows:
        for chunk, equal in enumerate(exact):
            firsts = [next((token for token, its in side if its == chunk), None) for side in (student, teacher)]
            if equal and None not in firsts:
                counted[tuple(firsts)] += 1
    return sorted((*pair, count) for pair, count in counted.items())


def counted(rows):
    counter = FirstTokenCounter()
    for row, exact in rows:
        arrays = [np.array(side, np.int32).reshape(-1, 2).T for side in row]
        counter.add(*(first_of_chunks(ids, chunk_id, np.array(exact)) for ids, chunk_id in arrays))
    return counter.total()


def listed(first):
    return list(zip(first.student.tolist(), first.teacher.tolist(), first.count.tolist()))


@given(st.lists(sides(), max_size=6), st.integers(0, 6), st.integers(0, 4))
def test_counts_are_those_by_hand_however_the_rows_are_split(rows, cut, waiting):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_tokens, "_WAITING", waiting)  # few chunks, and they are added up on the way
        assert listed(counted(rows)) == by_hand(rows)
    parts = [counted(rows[cut:]), counted(rows[:cut])]
    assert listed(FirstTokens.added(parts)) == listed(FirstTokens.added(reversed(parts))) == by_hand(rows)


SOME = FirstTokens(np.array([0, 7, 200_000]), np.array([3, 1, 250_000]), np.array([1, 2**40, 5]))


def test_counts_are_stored(tmp_path):
    write_first_tokens(tmp_path / "first", {"teacher_a": SOME, "teacher_b": FirstTokens.added([])})
    assert listed(read_first_tokens(tmp_path / "first", "teacher_a")) == listed(SOME)
    assert listed(read_first_tokens(tmp_path / "first", "teacher_b")) == []
    with pytest.raises(InputError, match=r"first: its teacher_c.count is missing"):
        read_first_tokens(tmp_path / "first", "teacher_c")


@pytest.mark.parametrize("damage", ["cut", "short", "negative", "float", "format"])
def test_damaged_counts_are_refused(tmp_path, damage):
    path = tmp_path / "first"
    write_first_tokens(path, {"teacher_a": SOME})
    tensors = load_file(path)
    count = tensors["teacher_a.count"]
    changed = {"short": count[:-1], "negative": -count, "float": count.astype(np.float32)}
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        of = "another" if damage == "format" else FORMAT
        save_file(tensors | {"teacher_a.count": changed.get(damage, count)}, path, {"format": of})
    with pytest.raises(InputError, match=f"^{path}: "):
        read_first_tokens(path, "teacher_a")
