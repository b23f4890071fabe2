"""Rows: what is cut fits, covers the same text on every side and loses nothing; files, shards, packing and batches."""

import json
import tempfile
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support import assets
from tests.support.examples import examples
from tests.support.tiny import tiny_tokenizer
from xtoken_core.data import prepare
from xtoken_core.data.batch import Collator
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.data.reading import PackedRows, load_rows, pack, row_lengths, rows_of_shards, training_rows
from xtoken_core.data.rows import Side, common_cuts, document_rows, empty, spans, tokenize_texts, with_eos
from xtoken_core.data.statistics import all_shards, check_statistics, statistics_of
from xtoken_core.errors import InputError
from xtoken_core.first_tokens import FIRST_TOKENS, FirstTokens, read_first_tokens
from xtoken_core.losses import TeacherBatch
from xtoken_core.losses.selection import chunk_rows
from xtoken_core.spec import DistillationSpec, LossSpec
from xtoken_core.tokenization import normalize_for

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 6,
    "def f(x):\n    return x ** 2  # 123456\n\n\n\tprint('naïve café')\n" * 4,
    "日本語のテキストと中文文本,混ざった English 🙂🙃👩‍👩‍👧. " * 5,
    "Decomposed: cafe\u0301, A\u030angstro\u0308m; Arabic العربية; rare\u3000spaces\u00a0\u2003here.",
    "one",
    "  leading and trailing  ",
]


@cache
def sides() -> tuple[Side, ...]:
    """A byte-level student without BOS, a SentencePiece teacher with BOS and prefix space, one that normalises to NFC."""
    return tuple(
        Side.of(name, column, assets.tokenizer(which))
        for name, column, which in [
            ("student", "student", "gpt2"),
            ("teacher mistral", "teacher_0", "mistral"),
            ("teacher qwen", "teacher_1", "qwen3"),
        ]
    )


def row_text(row: dict, side: Side) -> bytes:
    """The bytes that a row's tokens cover, less the space that a tokenizer put in front of the document."""
    ids, widths = row[f"{side.column}_ids"], row[f"{side.column}_bytes"]
    return b"".join(side.table[i][len(side.table[i]) - w :] for i, w in zip(ids.tolist(), widths.tolist()))


def all_rows(text: str, limit: int) -> list[dict]:
    [document] = tokenize_texts([text], sides())
    rows = document_rows(document, [limit - (side.bos is not None) for side in sides()], sides(), whole=False)
    assert not isinstance(rows, str), rows
    return rows


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("limit", [12, 40, 1000])
def test_rows_cover_the_text_on_every_side(text, limit):
    rows = all_rows(text, limit)
    for side in sides():
        assert all(len(row[f"{side.column}_ids"]) <= limit for row in rows)
        assert [row_text(row, side) for row in rows] == [row_text(row, sides()[0]) for row in rows]
        if side.bos is not None:
            assert all(row[f"{side.column}_ids"][0] == side.bos for row in rows)
    assert [row["num_bytes"] for row in rows] == [len(row_text(row, sides()[0])) for row in rows]
    whole = normalize_for(text, [side.table for side in sides()]).encode()
    assert b"".join(row_text(row, sides()[0]) for row in rows) == whole


@examples(300)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80), st.integers(8, 60))
def test_chunks_of_rows_are_byte_identical(text, limit):
    [document] = tokenize_texts([text], sides())
    rows = document_rows(document, [limit - (side.bos is not None) for side in sides()], sides(), whole=False)
    for row in [] if isinstance(rows, str) else rows:
        for side in sides()[1:]:
            ids = (row[f"{side.column}_student_chunk_id"], row[f"{side.column}_teacher_chunk_id"])
            for chunk, exact in enumerate(row[f"{side.column}_chunk_exact"].tolist()):
                texts = [
                    b"".join(
                        s.table[i][len(s.table[i]) - w :]
                        for i, w, c in zip(row[f"{s.column}_ids"].tolist(), row[f"{s.column}_bytes"].tolist(), of.tolist())
                        if c == chunk
                    )
                    for s, of in zip((sides()[0], side), ids)
                ]
                assert texts[0] and texts[1]
                assert (texts[0] == texts[1]) == exact


def test_text_that_a_vocabulary_cannot_spell_is_inexact_or_dropped():
    ascii_only = Tokenizer(models.BPE({chr(c): c - 33 for c in range(33, 127)} | {"\u0120": 94}, []))
    ascii_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ascii_only.decoder = decoders.ByteLevel()
    teacher = Side.of("teacher ascii", "teacher_0", PreTrainedTokenizerFast(tokenizer_object=ascii_only))
    both = [sides()[0], teacher]
    texts = ["a plain text with one odd caf\u00e9 in it", "日本語のテキスト ab cd" * 3, "日本語", "plain"]
    odd, mixed, foreign, plain = tokenize_texts(texts, both)
    [(student_chunk, _, exact)] = odd.chunks
    assert (~exact).sum() == 1 and exact.sum() > 5
    [place] = np.flatnonzero(~exact)
    spelled = b"".join(both[0].table[i] for i in odd.ids[0][student_chunk == place])
    assert "\u00e9" in spelled.decode()
    assert mixed.startswith("teacher ascii: ")
    assert document_rows(foreign, [9, 9], both, whole=False) == "teacher ascii: no chunk in common with the student"
    assert plain.chunks[0][2].all()


def test_a_text_of_which_no_character_has_a_token_is_no_text():
    words = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581", -1.0), ("a", -2.0)], 0, False))
    words.decoder = decoders.Metaspace()
    student = Side.of("student", "student", PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>"))
    foreign, some = tokenize_texts(["日本語", "日本語a"], [student])
    assert len(foreign.ids[0]) and document_rows(with_eos(foreign, [student]), [9], [student], whole=False) == "no text"
    [row] = document_rows(some, [9], [student], whole=False)
    assert row["num_bytes"] == 1


def test_a_chat_that_was_rendered_into_a_text_is_told_of(tmp_path, capsys):
    """Its names of special tokens are text, not the tokens that the model knows."""
    tiny_tokenizer(300).save_pretrained(tmp_path / "student")
    lines = ["a text", "User: hi<eos>\nBot: ho<eos>", "<eos> again", "a <br> b"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    spec = {
        "name": "n", "student": {"model": str(tmp_path / "student")}, "output": {"uri": "out"},
        "teachers": [{"id": "t", "model": "unread"}], "data": {"train": [str(tmp_path / "texts.jsonl")]},
    }  # fmt: skip
    prepare_rows(DistillationSpec.from_text(json.dumps(spec)), tmp_path / "rows")
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    said = "student: '<eos>' in a text is read as text; chats come as messages"
    assert told == [f"warning: {tmp_path}/texts.jsonl:2: {said}"]
    last = load_rows(tmp_path / "rows")[1]["student_ids"]
    assert (last == tiny_tokenizer(300).eos_token_id).sum() == 1  # the document's own end


def test_one_text_that_the_normalisers_cannot_settle_is_left_out():
    """One composes characters, the other takes them apart."""
    sides = []
    for name, normalizer in (("student", normalizers.NFC()), ("teacher t", normalizers.NFD())):
        tok = tiny_tokenizer(300)
        tok.backend_tokenizer.normalizer = normalizer
        sides.append(Side.of(name, name, tok))
    first, second, third = tokenize_texts(["even", "ödd", "even"], sides)
    assert second.startswith("tokenizers: their normalisers undo each other on ")
    assert first.ids[0].tolist() == third.ids[0].tolist() == sides[0].encode(["even"])[0].tolist()


def test_a_document_ends_with_every_sides_eos():
    [plain] = tokenize_texts([TEXTS[0]], sides())
    ended = with_eos(plain, sides())
    for side, before, ids, targets, widths in zip(sides(), plain.ids, ended.ids, ended.targets, ended.widths):
        assert ids.tolist() == [*before.tolist(), side.table.roles["eos"]] and targets[-1] == 1 and widths[-1] == 0
    for student, teacher, exact in ended.chunks:
        assert student[-1] == teacher[-1] == len(exact) - 1 and exact[-1]
    assert ended.cuts[-1].tolist() == [len(ids) for ids in ended.ids]
    assert with_eos(empty(3), sides()).ids[0].tolist() == []
    with_bos = replace(sides()[1].table, roles={"bos": 1, "eos": 0})  # W pairs the student's only special token with BOS
    other = [
        replace(sides()[0], table=replace(sides()[0].table, roles={"bos": 50256, "eos": 50256})),
        replace(sides()[1], table=with_bos),
    ]
    [(student, _, _)] = with_eos(tokenize_texts(["a b"], other)[0], other).chunks
    assert student[-1] == -1


def test_an_eos_that_fits_no_more_is_no_row():
    [document] = tokenize_texts([TEXTS[0]], sides()[:1])
    size = len(document.ids[0])
    ended = with_eos(document, sides()[:1])
    assert [len(row["student_ids"]) for row in document_rows(ended, [size], sides()[:1], whole=False)] == [size]


def test_rows_are_the_documents_own_tokens():
    text = TEXTS[0]
    for side in sides():
        [whole] = side.encode([text])
        start = side.bos is not None
        cut = np.concatenate([row[f"{side.column}_ids"][start:] for row in all_rows(text, 16)])
        assert cut.tolist() == whole.tolist()


def test_cuts_are_where_all_tokenizations_meet():
    first = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 2]), np.ones(3, bool)  # ends after student tokens 2, 3, 5
    second = np.array([0, 1, 1, 2, 3]), np.array([0, 1, 1, 2, 3, 3]), np.ones(4, bool)  # after 1, 3, 4, 5
    assert common_cuts([first, second], [5, 3, 6]).tolist() == [[0, 0, 0], [3, 2, 3], [5, 3, 6]]
    assert common_cuts([], [3]).tolist() == [[0], [1], [2], [3]]


def test_a_stretch_too_long_for_a_side_is_left_out():
    cuts = np.array([[0, 0], [2, 2], [3, 12], [5, 13], [6, 14]])
    assert spans(cuts, [4, 4]) == [(0, 1), (2, 4)]
    assert spans(cuts, [4, 1]) == [(2, 3), (3, 4)]
    assert spans(cuts, [100, 100]) == [(0, 4)]


@cache
def tokenizer_folders() -> tuple[str, str]:
    """Two small tokenizers, since every `prepare_rows` loads them anew."""
    folder = Path(tempfile.mkdtemp())
    for size in (300, 400):
        tiny_tokenizer(size).save_pretrained(folder / str(size))
    return str(folder / "300"), str(folder / "400")


def make_spec(train, **data) -> DistillationSpec:
    student, other = tokenizer_folders()
    spec = {
        "name": "rows",
        "student": {"model": student},
        "teachers": [{"id": "same", "model": student}, {"id": "other", "model": other, "projection": {}}],
        "data": {"train": [str(t) for t in train], "max_length": 80, **data},
        "output": {"uri": "unused"},
    }
    return DistillationSpec.from_text(json.dumps(spec))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(TEXTS[:3])) + "\n")
    (folder / "b.txt").write_text(TEXTS[3], encoding="utf-8")
    pa.parquet.write_table(pa.table({"text": [*TEXTS[4:], "", "last one of all"]}), folder / "c.parquet")
    return folder


def columns(rows) -> list[dict]:
    return [{k: np.asarray(v).tolist() for k, v in row.items()} for row in rows]


def test_prepare_reads_every_format_and_counts(corpus, tmp_path):
    stats = prepare_rows(make_spec([corpus]), tmp_path / "rows")
    rows = load_rows(tmp_path / "rows")
    assert stats.documents == 8 and stats.dropped_documents == {"no text": 1}
    assert stats.rows == len(rows) and stats.student_tokens == sum(len(r["student_ids"]) for r in rows)
    assert {name: c.documents for name, c in stats.corpora.items()} == {"a": 3, "corpus": 1, "c": 4}
    assert sorted(set(rows["document"][:].tolist())) == [0, 1, 2, 3, 4, 5, 7]
    assert stats.teachers["other"].exact_chunks == stats.teachers["other"].chunks > 0
    assert [name for name in rows.column_names if name.startswith("teacher") and name.endswith("_ids")] == ["teacher_other_ids"]
    assert statistics_of(str(tmp_path / "rows")) == stats


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("max_rows", [None, 5])
def test_shards_hold_the_rows_of_one(corpus, tmp_path, packing, max_rows):
    def prepared(shards):
        spec = make_spec([corpus], shards=shards, packing=packing, max_rows=max_rows)
        for shard in range(shards):
            prepare_rows(spec, tmp_path / f"{shards}-{shard}", shard=shard)
        rows = training_rows(spec.data, *(tmp_path / f"{shards}-{shard}" for shard in range(shards)))
        if packing:
            assert isinstance(rows, PackedRows)
            assert all(sum(len(r["student_ids"]) for r in item) <= 80 for item in rows)
        return [columns(item) if packing else columns([item])[0] for item in (rows[i] for i in range(len(rows)))]

    one = prepared(1)
    assert prepared(3) == one
    assert prepared(11) == one  # more shards than documents
    assert max_rows is None or len(one) == max_rows


def test_long_documents_are_tokenized_a_few_at_a_time(corpus, tmp_path, monkeypatch):
    spec, together = make_spec([corpus]), []
    prepare_rows(spec, tmp_path / "whole")
    inner = prepare.DocumentTokenizer.outcomes
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(prepare.DocumentTokenizer, "outcomes", lambda self, batch: together.append(batch) or inner(self, batch))
    prepare_rows(spec, tmp_path / "parts")
    sizes = [[len(document.content) for document in batch] for batch in together]
    assert len(sizes) > 2 and all(sum(batch[:-1]) < 100 for batch in sizes)
    assert columns(load_rows(tmp_path / "parts")) == columns(load_rows(tmp_path / "whole"))


def test_statistics_of_shards_are_those_of_one(corpus, tmp_path):
    one = prepare_rows(make_spec([corpus]), tmp_path / "one")
    for shards in (3, 11):
        spec = make_spec([corpus], shards=shards)
        total = all_shards([prepare_rows(spec, tmp_path / f"{shards}-{k}", shard=k) for k in range(shards)])
        assert total.started >= one.started and total.seconds > 0
        assert total == one.model_copy(update={"started": total.started, "seconds": total.seconds})


def test_first_tokens_of_shards_are_those_of_one(corpus, tmp_path):
    """And those of the rows: the text begins every chunk with one token of each side."""
    for shards in (1, 3):
        for k in range(shards):
            prepare_rows(make_spec([corpus], shards=shards), tmp_path / f"{shards}-{k}", shard=k)

    def counted(*folders):
        parts = [read_first_tokens(tmp_path / folder / FIRST_TOKENS, "teacher_other") for folder in folders]
        first = FirstTokens.added(parts)
        return list(zip(first.student.tolist(), first.teacher.tolist(), first.count.tolist()))

    expected: Counter = Counter()
    for row in load_rows(tmp_path / "1-0"):
        for chunk in range(len(row["teacher_other_chunk_exact"])):
            own, other = (
                int(row[f"{side}_ids"][np.argmax(row[f"teacher_other_{of}_chunk_id"] == chunk)])
                for side, of in (("student", "student"), ("teacher_other", "teacher"))
            )
            expected[own, other] += 1
    assert counted("1-0") == counted("3-2", "3-0", "3-1") == sorted((*pair, count) for pair, count in expected.items())
    assert any(own != other for own, other in expected)


@pytest.mark.parametrize("packing", [False, True])
def test_shards_without_anything_to_learn_from(corpus, tmp_path, packing):
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n' * 2)
    spec = make_spec([tmp_path / "blank.jsonl"], shards=2, packing=packing)
    folders = [str(tmp_path / f"rows-{shard}") for shard in range(2)]
    for shard, folder in enumerate(folders):
        prepare_rows(spec, f"{folder}/train", shard=shard)
    with pytest.raises(InputError, match="^data.train: no rows: all 2 documents dropped, 2 since no text$"):
        rows_of_shards(spec.data, folders)
    counted = statistics_of(f"{folders[0]}/train").model_copy(update={"rows": 1})
    with pytest.raises(InputError, match="^data.train: teacher .+ has no chunk in common with the student$"):
        check_statistics(counted, "data.train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt: no such file"),
        ("bad.txt", b"caf\xe9 au lait", "all 1 documents dropped, 1 since not UTF-8 text ({}"),
        (
            "bad.jsonl",
            b'{"text": "fine"}\n{"text": \n{"text": 1}',
            "2 of 3 documents cannot be used, 1 since not JSON: Expecting value ({}:2)",
        ),
        ("bad.jsonl", b'{"body": "x"}\n', "{}:1: no field 'text' (data.text_key) and none of a chat; there are body"),
        ("bad.jsonl", b'{"text": 3}\n', "1 since 'text' is not text ({}:1)"),
        ("bad.jsonl", b'{"text": "\\ud800"}\n', "1 since 'text' is not text ({}:1)"),
        ("null.jsonl", b'{"text": null}\n', "data.train: no rows: all 1 documents dropped, 1 since no text ({}:1)"),
        ("bad.parquet", b"PAR1 nonsense", "bad.parquet: cannot be read"),
        ("bad.md", b"# text", "bad.md: not a .txt, .jsonl or .parquet file"),
        ("empty.jsonl", b"\n\n", "data.train: no documents"),
        ("empty.txt", b"", "data.train: no rows: all 1 documents dropped, 1 since no text"),
    ],
)
def test_unreadable_input_is_one_line_that_names_it(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        prepare_rows(make_spec([tmp_path / name]), tmp_path / "rows")
    assert message.replace("{}", str(tmp_path / name)) in str(error.value) and "\n" not in str(error.value)


def test_as_many_folders_of_rows_as_shards(corpus, tmp_path):
    """One that is forgotten would be trained without, in silence."""
    spec = make_spec([corpus], shards=2)
    for shard in range(2):
        prepare_rows(spec, tmp_path / f"{shard}" / "train", shard=shard)
    assert len(rows_of_shards(spec.data, [str(tmp_path / "0"), str(tmp_path / "1")]))
    with pytest.raises(InputError, match=r"^rows: 1 folders were given for 2 shards \(data.shards\)$"):
        rows_of_shards(spec.data, [str(tmp_path / "0")])


@pytest.mark.parametrize("shard", [-1, 2])
def test_a_shard_that_is_none(corpus, tmp_path, shard):
    """Counted from one, the last would be empty, and the first one's documents in no rows."""
    with pytest.raises(InputError, match=f"^shard: {shard} is not one of data.shards, which are 0 to 1$"):
        prepare_rows(make_spec([corpus], shards=2), tmp_path / "rows", shard=shard)


def test_a_column_that_is_not_there(tmp_path):
    pa.parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(
        InputError, match=r"c.parquet: no column 'text' or 'messages' \(data.text_key, data.messages_key\); there are "
    ):
        prepare_rows(make_spec([tmp_path / "c.parquet"]), tmp_path / "rows")


def make_row(student, teacher, student_chunks, teacher_chunks) -> dict:
    def array(values, dtype=np.int32):
        return np.array(values, dtype)

    row = {"document": 0, "num_bytes": 0, "teacher_0_chunk_exact": np.ones(max(student_chunks) + 1, bool)}
    for name, ids in (("student", student), ("teacher_0", teacher)):
        row |= {f"{name}_ids": array(ids), f"{name}_mask": np.ones(len(ids), np.uint8), f"{name}_bytes": array(ids, np.uint16)}
    return row | {
        "teacher_0_student_chunk_id": array(student_chunks),
        "teacher_0_teacher_chunk_id": array(teacher_chunks),
    }


ROWS = [
    make_row([5, 6, 7], [1, 8, 9, 4], [0, 0, 1], [-1, 0, 1, 1]),  # the student has no BOS: chunk 0 keeps its second token
    make_row([5, 6], [1, 8, 9], [0, 1], [-1, 0, 1]),  # chunk 0 keeps none
]


def test_batches_are_padded_and_masked():
    batch = Collator(["teacher_0", None], {"student": 99, "teacher_0": 77})(ROWS)
    student, (teacher, same) = batch.student, batch.teachers
    assert same is student
    assert student.input_ids.tolist() == [[5, 6, 7], [5, 6, 99]] and teacher.input_ids[1].tolist() == [1, 8, 9, 77]
    assert student.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert student.token_mask.tolist() == [[0, 1, 1], [0, 1, 0]]
    assert student.token_bytes.tolist() == [[5, 6, 7], [5, 6, 0]] and student.token_bytes.dtype == torch.int32
    assert teacher.chunks.student_chunk_id.tolist() == [[0, 0, 1], [0, 1, -1]]
    assert teacher.chunks.teacher_chunk_id.tolist() == [[-1, 0, 1, 1], [-1, 0, 1, -1]]
    assert teacher.chunks.chunk_valid.tolist() == [[True, True], [False, True]]
    assert batch.sample_mask.tolist() == [1, 1]


def test_a_batch_moves_as_a_whole_and_what_was_one_side_stays_one():
    batch = Collator(["teacher_0", None], {"student": 99, "teacher_0": 77})([[ROWS[0], ROWS[1]]])
    moved = batch.to("meta")
    assert moved.teachers[1] is moved.student
    student, teacher = moved.student, moved.teachers[0]
    tensors = [moved.sample_mask, *vars(student.packed).values(), *vars(teacher.chunks).values(), teacher.token_mask]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.student.input_ids.device.type == "cpu"


def test_a_chunk_without_its_first_token_is_not_valid_where_the_first_counts():
    side = Collator(["teacher_0"], {"student": 0, "teacher_0": 0})(ROWS).teachers[0]
    teacher = TeacherBatch(torch.empty(2, 4, 1), **vars(side.chunks))
    valid = {
        distribution: chunk_rows(teacher, torch.ones(2), LossSpec(chunk_distribution=distribution)).valid.view(2, 2).tolist()
        for distribution in ("mean", "first")
    }
    assert valid == {"mean": [[True, True], [False, True]], "first": [[False, True], [False, True]]}


def test_a_packed_batch_is_that_of_its_rows_one_by_one():
    collate = Collator(["teacher_0"], {"student": 0, "teacher_0": 0})
    packed, single = collate([[ROWS[0], ROWS[1]], [ROWS[1]]]), collate([ROWS[0], ROWS[1], ROWS[1]])
    for side, alone in ((packed.student, single.student), (packed.teachers[0], single.teachers[0])):
        for key in ("input_ids", "attention_mask", "token_mask", "token_bytes"):
            assert torch.equal(getattr(side, key), getattr(alone, key)), key
        gathered = side.unpacked(side.packed.input_ids)
        assert torch.equal(gathered * side.attention_mask, alone.input_ids)
    for ours, theirs in zip(vars(packed.teachers[0].chunks).values(), vars(single.teachers[0].chunks).values(), strict=True):
        assert torch.equal(ours, theirs)
    assert packed.student.packed.input_ids.tolist() == [[5, 6, 7, 5, 6], [5, 6, 0, 0, 0]]
    assert packed.student.packed.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=1, max_size=200), st.integers(1, 8))
def test_packing_fills_no_row_beyond_its_limit_and_loses_none(lengths, open_bins):
    array = np.array(lengths)
    bins = pack(array, 10, open_bins)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all((array[b].sum(axis=0) <= 10).all() for b in bins)
    assert [b[0] for b in bins] == sorted(b[0] for b in bins)


def test_row_lengths_follow_a_selection(corpus, tmp_path):
    prepare_rows(make_spec([corpus]), tmp_path / "rows")
    rows = load_rows(tmp_path / "rows")
    chosen = rows.select([3, 0, 5])
    assert row_lengths(chosen, "teacher_other").tolist() == [len(rows[i]["teacher_other_ids"]) for i in (3, 0, 5)]
