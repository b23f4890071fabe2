"""Alignment against a plain two-pointer walk, on random and on real tokenizers, and on texts that differ."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import assets
from tests.support.examples import examples
from tests.test_tokenization import HARD, TEXT
from xtoken_core.alignment import Alignment, align, align_rows
from xtoken_core.tokenization import TokenTable, encode, normalize_for

PAIRS = (
    ("llama3", "qwen3"),
    ("smollm2", "gemma3"),
    ("qwen3", "mistral"),
    ("llama2", "llama3"),
    ("mistral", "llama2"),
    ("claude", "gemma3"),
    ("deepseek", "claude"),
)


def make_table(tokens: list[bytes], special: tuple[int, ...] = (), dummy: bool = False) -> TokenTable:
    """A table of the given bytes; ids in `special` stand for nothing."""
    is_special = np.isin(np.arange(len(tokens)), special)
    tokens = [b"" if s else t for t, s in zip(tokens, is_special, strict=True)]
    return TokenTable(tokens, is_special, ~is_special, {}, dummy, dummy, False)


def walk(student: list[bytes], teacher: list[bytes]) -> tuple[list[int], list[int], int]:
    """The plain definition, for tokens that spell the same text: advance the side that is behind."""
    chunk, ids, at, place = 0, ([], []), [0, 0], [0, 0]
    while place[0] < len(student) or place[1] < len(teacher):
        side = int(at[0] > at[1]) if at[0] != at[1] else int(place[0] == len(student))
        at[side] += len((student, teacher)[side][place[side]])
        ids[side].append(chunk)
        place[side] += 1
        chunk += at[0] == at[1]
    return *ids, chunk


def check_chunks(a: Alignment, student: list[bytes], teacher: list[bytes]) -> None:
    """What holds for every alignment: chunks are in order, on both sides, and exact ones have equal bytes."""
    for ids, tokens in ((a.student_chunk_id, student), (a.teacher_chunk_id, teacher)):
        assert ids.dtype == np.int32 and len(ids) == len(tokens)
        inside = ids[ids >= 0]
        assert (np.diff(inside) >= 0).all() and set(inside.tolist()) == set(range(a.num_chunks))
    assert len(a.exact) == a.num_chunks and a.exact.dtype == bool
    texts = [
        [b"".join(t for t, c in zip(tokens, ids.tolist(), strict=True) if c == chunk) for chunk in range(a.num_chunks)]
        for tokens, ids in ((student, a.student_chunk_id), (teacher, a.teacher_chunk_id))
    ]
    for s, t, exact in zip(*texts, a.exact.tolist(), strict=True):
        assert (s == t) == exact and s and t


def tokens_of(name: str, text: str) -> tuple[list[int], list[bytes]]:
    """Ids of a text, and their bytes without the space in front that the tokenizer added."""
    ids = encode(assets.tokenizer(name), [text])[0]
    tokens = [assets.table(name)[i] for i in ids]
    if sum(map(len, tokens)) == len(assets.table(name).normalize(text).encode()) + 1:
        tokens[0] = tokens[0][1:]
    return ids, tokens


@st.composite
def two_tokenizations(draw) -> tuple[list[bytes], list[bytes]]:
    """A random byte string, cut in two ways."""
    text = draw(st.binary(min_size=1, max_size=80))
    cuts = [sorted(draw(st.sets(st.integers(1, len(text) - 1) if len(text) > 1 else st.nothing()))) for _ in range(2)]
    return tuple([text[a:b] for a, b in zip([0, *c], [*c, len(text)], strict=True)] for c in cuts)


@given(pair=two_tokenizations())
@examples(300)
def test_equals_the_walk(pair: tuple[list[bytes], list[bytes]]) -> None:
    student, teacher = pair
    result = align(range(len(student)), range(len(teacher)), make_table(student), make_table(teacher))
    expected = walk(student, teacher)
    assert result.student_chunk_id.tolist() == expected[0]
    assert result.teacher_chunk_id.tolist() == expected[1]
    assert result.num_chunks == expected[2] and result.exact.all()


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@given(text=TEXT)
@examples(40)
def test_real_tokenizers_meet_at_every_common_boundary(pair: tuple[str, str], text: str) -> None:
    tables = [assets.table(name) for name in pair]
    if "smollm2" in pair:
        text = "".join(c for c in text if all(bytes([b]) in assets.table("smollm2").ids_by_bytes for b in c.encode()))
    text = normalize_for(text, tables)
    (s, student), (t, teacher) = (tokens_of(name, text) for name in pair)
    result = align(s, t, *tables)
    expected = walk([x for x in student if x], [x for x in teacher if x])
    assert result.num_chunks == expected[2] and result.exact.all()
    assert [c for c, x in zip(result.student_chunk_id, student, strict=True) if x] == expected[0]
    assert [c for c, x in zip(result.teacher_chunk_id, teacher, strict=True) if x] == expected[1]


def test_a_bare_prefix_joins_the_next_chunk() -> None:
    table = make_table([b" ", b"a", b" a", b"b"], dummy=True)
    plain = make_table([b"a", b"ab", b"b"])
    result = align([0, 1, 3], [0, 2], table, plain)
    assert result.student_chunk_id.tolist() == [0, 0, 1] and result.teacher_chunk_id.tolist() == [0, 1]
    assert result.exact.all()
    result = align([2, 3], [1], table, plain)
    assert result.student_chunk_id.tolist() == [0, 0] and result.exact.tolist() == [True]


def test_prefix_appears_after_special_tokens_too() -> None:
    llama2, qwen = assets.table("llama2"), assets.table("qwen3")
    tok = assets.tokenizer("llama2")
    first, second = encode(tok, ["the cat", "123 sat"])
    assert llama2[second[0]] == b" "  # a bare prefix
    ids = [1, *first, 2, 1, *second, 2]
    eos = qwen.roles["eos"]
    other = [*encode(assets.tokenizer("qwen3"), ["the cat"])[0], eos, *encode(assets.tokenizer("qwen3"), ["123 sat"])[0], eos]
    result = align(ids, other, llama2, qwen)
    assert result.exact.all() and result.num_chunks == 2 + 4
    assert [c for c, i in zip(result.student_chunk_id.tolist(), ids, strict=True) if i in (1, 2)] == [-1] * 4
    assert result.student_chunk_id[len(first) + 3] == result.student_chunk_id[len(first) + 4] == 2


@pytest.mark.parametrize("text", [" starts with a space", "  two", "none", "\n line"])
def test_both_kinds_of_prefix(text: str) -> None:
    """The old Llama-2 tokenizer always adds a space, Metaspace only if there is none."""
    names = ("llama2", "mistral", "llama3")
    for a in names:
        for b in names:
            result = align(tokens_of(a, text)[0], tokens_of(b, text)[0], assets.table(a), assets.table(b))
            assert result.exact.all() and result.student_chunk_id.min() == 0


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_a_row_cut_out_of_a_longer_one_has_no_prefix(name: str) -> None:
    tables = assets.table(name), assets.table("llama3")
    (s, _), (t, _) = tokens_of(name, "first second third"), tokens_of("llama3", "first second third")
    rows = [s, s[1:], s[2:]], [t, t[1:], t[2:]]  # one token a word on both sides
    for result, words in zip(align_rows(*rows, *tables), (3, 2, 1), strict=True):
        assert result.student_chunk_id.tolist() == list(range(words)) and result.exact.all()


def test_special_tokens_belong_to_no_chunk() -> None:
    table = make_table([b"a", b"b", b"ab", b"<s>", b"</s>"], special=(3, 4))
    result = align([3, 0, 1, 4, 4], [2, 4], table, table)
    assert result.student_chunk_id.tolist() == [-1, 0, 0, -1, -1] and result.teacher_chunk_id.tolist() == [0, -1]
    result = align([3, 4], [4], table, table)
    assert result.num_chunks == 0 and result.student_chunk_id.tolist() == [-1, -1]


def test_kinds_of_input() -> None:
    table = make_table([b"a", b"b", b"ab"])
    for kind in (list, tuple, np.array, torch.tensor, lambda x: np.array(x, dtype=np.uint16)):
        result = align(kind([0, 1]), kind([2]), table, table)
        assert result.student_chunk_id.tolist() == [0, 0] and result.num_chunks == 1
    for s, t in (([], []), ([], [0]), ([0], [])):
        result = align(s, t, table, table)
        assert result.num_chunks == 0 and result.exact.shape == (0,)
        assert result.student_chunk_id.tolist() == [-1] * len(s) and result.teacher_chunk_id.tolist() == [-1] * len(t)


@pytest.mark.parametrize("ids", [[3], [-1], [[0]]])
def test_ids_that_are_none_are_refused(ids: list) -> None:
    table = make_table([b"a", b"b", b"ab"])
    with pytest.raises(ValueError, match="token ids"):
        align([0], ids, table, table)


@given(rows=st.lists(two_tokenizations(), min_size=1, max_size=5), empty=st.booleans())
@examples(100)
def test_rows_equal_single_calls(rows: list[tuple[list[bytes], list[bytes]]], empty: bool) -> None:
    tables, sides = [], []
    for side in (0, 1):
        tables.append(make_table([token for row in rows for token in row[side]]))
        ends = np.cumsum([0, *(len(row[side]) for row in rows)])
        sides.append([list(range(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)])
        if empty:
            sides[-1].insert(len(rows) // 2, [])
    for s, t, many in zip(*sides, align_rows(*sides, *tables), strict=True):
        one = align(s, t, *tables)
        assert one.student_chunk_id.tolist() == many.student_chunk_id.tolist()
        assert one.teacher_chunk_id.tolist() == many.teacher_chunk_id.tolist()
        assert one.num_chunks == many.num_chunks and many.exact.all()


def test_rows_with_special_tokens_prefixes_and_differences() -> None:
    names = ("mistral", "gemma3")
    texts = ["One row.", "", " Another, with ▁ in it, long enough to meet again.", "123", "\n\n"]
    rows = [[[1, *r, 2] for r in encode(assets.tokenizer(names[0]), texts)], encode(assets.tokenizer(names[1]), texts)]
    tables = [assets.table(name) for name in names]
    for s, t, many in zip(*rows, align_rows(*rows, *tables), strict=True):
        one = align(s, t, *tables)
        assert one.student_chunk_id.tolist() == many.student_chunk_id.tolist()
        assert one.teacher_chunk_id.tolist() == many.teacher_chunk_id.tolist()
        assert one.exact.tolist() == many.exact.tolist()


def test_a_truncated_side_leaves_a_tail_without_chunk() -> None:
    table = make_table([b"aa", b"b", b"c", b"bc", b"dd"])
    result = align([0, 1, 2, 4, 4], [0, 3], table, table)
    assert result.student_chunk_id.tolist() == [0, 1, 1, -1, -1] and result.exact.all()
    result = align([0, 1], [0, 3, 4], table, table)
    assert result.student_chunk_id.tolist() == [0, -1] and result.teacher_chunk_id.tolist() == [0, -1, -1]


def test_a_difference_costs_one_chunk() -> None:
    """Of equal length, too: only the content tells."""
    left, right = "The quick brown fox jumps over the lazy dog.", "The quick brawn fox jumps over the lazy dog."
    ids = [encode(assets.tokenizer(n), [t])[0] for n, t in (("llama3", left), ("qwen3", right))]
    result = align(*ids, assets.table("llama3"), assets.table("qwen3"))
    check_chunks(result, [assets.table("llama3")[i] for i in ids[0]], [assets.table("qwen3")[i] for i in ids[1]])
    assert result.exact.tolist() == [True, True, False, True, True, True, True, True, True, True]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("seed", range(4))
def test_text_as_it_comes_is_never_exact_where_it_differs(pair: tuple[str, str], seed: int) -> None:
    """Not normalised: NFC and NFKC, low blocks, missing bytes and prefixes make the sides differ."""
    words = [*HARD, *(unicodedata.normalize("NFD", h) for h in HARD), "Việt Nam ", unicodedata.normalize("NFD", "Việt Nam ")]
    text = "".join(random.Random(seed).choices(words, k=12))
    (s, student), (t, teacher) = (tokens_of(name, text) for name in pair)
    result = align(s, t, *(assets.table(name) for name in pair))
    check_chunks(result, student, teacher)
    assert result.exact.mean() > 0.5


@st.composite
def two_edited_texts(draw) -> tuple[list[bytes], list[bytes]]:
    """Two tokenizations of which one has some stretches replaced, removed or added."""
    student, _ = draw(two_tokenizations())
    alphabet = draw(st.sampled_from([b"ab", b"abcdefgh ", bytes(range(256))]))
    base = [bytes(alphabet[b % len(alphabet)] for b in token) for token in student * draw(st.integers(1, 4))]
    edited = []
    for token in base:
        edit = draw(st.sampled_from(["keep"] * 8 + ["drop", "add", "change"]))
        edited += {"keep": [token], "drop": [], "add": [b"+", token], "change": [token[:-1] + b"~"]}[edit]
    return base, edited


@given(pair=two_edited_texts())
@examples(300)
def test_edited_texts(pair: tuple[list[bytes], list[bytes]]) -> None:
    student, teacher = pair
    try:
        result = align(range(len(student)), range(len(teacher)), make_table(student), make_table(teacher))
    except ValueError as e:
        assert "different texts" in str(e)
    else:
        check_chunks(result, student, teacher)


def test_different_texts_are_refused() -> None:
    ids = [
        encode(assets.tokenizer("qwen3"), [t])[0] for t in ("An entirely different sentence.", "Nothing of this is up there, no.")
    ]
    with pytest.raises(ValueError, match="different texts"):
        align(*ids, assets.table("qwen3"), assets.table("qwen3"))


def test_many_differences_stay_linear() -> None:
    """2 MB with a difference every 40 bytes: a quadratic search would not end."""
    table = make_table([b"0123456789abcdefghij", b"KLMNOPQRSTUVWXYZklmn", b"opqrstuvwxyz", b"x", b"yy"])
    unit_a, unit_b = [0, 1, 3, 2], [0, 1, 4, 2]
    n = 40_000
    result = align(unit_a * n, unit_b * n, table, table)
    assert result.num_chunks == 4 * n and result.exact.sum() == 3 * n
