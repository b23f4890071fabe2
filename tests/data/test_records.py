"""Records of every shape that people publish, and files with flaws."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from xtoken_core.data.documents import check_corpora, read_documents
from xtoken_core.data.hub import HubDataset, hub_dataset
from xtoken_core.data.records import Conversation, Refused, Unusable, content_of
from xtoken_core.errors import InputError
from xtoken_core.spec import DataSpec, DistillationSpec

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"name": "weather", "arguments": {"city": "Paris"}}


def spec(**data) -> DataSpec:
    return DataSpec(train=("unused",), **data)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [ASKED, SAID], "text": "Hi Hello"}, [ASKED, SAID]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, [ASKED, SAID]),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": 0}], "system": "S"},
            [{"role": "system", "content": "S"}, ASKED, SAID | {"weight": 0}],
        ),
        (
            {"conversations": [{"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "sun"}]},
            [
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "content": "sun"},
            ],
        ),
        ({"conversations": [ASKED, SAID]}, [ASKED, SAID]),
        ({"prompt": "Hi", "completion": "Hello"}, [ASKED, SAID]),
        ({"prompt": [ASKED], "completion": [SAID]}, [ASKED, SAID]),
        ({"messages": [ASKED | {"tool_calls": None, "name": None}, SAID]}, [ASKED, SAID]),  # as Arrow fills them up
        ({"messages": [{"from": "human", "value": "Hi"}, SAID]}, [ASKED, SAID]),
        ({"messages": [ASKED, SAID], "system": "S"}, [{"role": "system", "content": "S"}, ASKED, SAID]),
        ({"prompt": "Hi", "completion": "Hello", "system": "S"}, [{"role": "system", "content": "S"}, ASKED, SAID]),
        (
            {"messages": [{"role": "system", "content": "S", "name": None}, ASKED, SAID], "system": "S"},  # said already
            [{"role": "system", "content": "S"}, ASKED, SAID],
        ),
        ({"messages": None, "prompt": "Hi", "completion": "Hello"}, [ASKED, SAID]),
    ],
)
@pytest.mark.parametrize("form", ["auto", "messages"])
def test_chats_of_every_shape(record, messages, form):
    assert content_of(record, spec(format=form)) == Conversation(messages)


def test_texts_and_tools():
    assert content_of({"text": "\ufeffA text"}, spec()) == "A text"
    for chat in ({"messages": [ASKED]}, {"conversations": [ASKED, SAID]}, {"prompt": "Hi", "completion": "Hello"}):
        assert content_of({"body": "x"} | chat, spec(text_key="body")) == "x"  # which the spec asks for
        assert content_of(chat, spec(text_key="body")).messages[0] == ASKED  # of a corpus of both
    assert content_of({"prompt": "Hi", "completion": "Hello"}, spec(text_key="completion")) == "Hello"
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for given in (tools, json.dumps(tools)):
        assert content_of({"messages": [ASKED], "tools": given}, spec()).tools == tools
    for given in (None, [], ""):
        assert content_of({"messages": [ASKED], "tools": given}, spec()).tools is None


MIXED = {
    "text": ["a text", None, None, None],
    "messages": [None, [ASKED, SAID], None, None],
    "conversations": [None, None, [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], None],
}
"""Columns of a table that was put together out of others: of each row most are null."""


def test_an_empty_column_is_as_good_as_none():
    for nothing in (None, "", []):
        assert content_of({"messages": nothing, "text": "a text"}, spec()) == "a text"
        assert content_of({"text": nothing, "messages": [ASKED]}, spec(text_key="text")) == Conversation([ASKED])
        assert content_of({"text": nothing, "messages": nothing}, spec()) == ""
    assert content_of({"prompt": "", "completion": "Hello"}, spec()).messages[1] == SAID


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "options", [{}, {"text_key": "text", "messages_key": "messages"}, {"messages_key": "conversations"}], ids=str
)
def test_a_null_is_as_good_as_no_column(tmp_path, suffix, options):
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(MIXED, row))) for row in zip(*MIXED.values())))
    else:
        pa.parquet.write_table(pa.table(MIXED), path)
    chat, found = Conversation([ASKED, SAID]), list(read_documents([str(path)], spec(**options)))
    assert not any(document.unusable for document in found)
    second = "" if options.get("messages_key") == "conversations" else chat  # a column that nobody has asked for
    assert [document.content for document in found] == ["a text", second, chat, ""]


def test_nulls_that_arrow_fills_in_are_in_no_call_and_no_tool(tmp_path):
    """Each object of a column gets the keys of all others: a template would print them."""
    calls = [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "clock", "arguments": {"zone": 3, "content": "x"}}]
    tools = [
        {"name": call["name"], "parameters": {"properties": {name: {"type": "string"} for name in call["arguments"]}}}
        for call in calls
    ]
    chats = [
        [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}] for call in calls
    ]
    pa.parquet.write_table(pa.table({"messages": chats, "tools": [[tool] for tool in tools]}), tmp_path / "data.parquet")
    found = [document.content for document in read_documents([str(tmp_path)], spec())]
    assert found == [Conversation(chat, [tool]) for chat, tool in zip(chats, tools)]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [ASKED, SAID], "functions": [{"name": "weather"}]}, "tools stand in 'tools'"),
        ({"messages": [ASKED, SAID | {"function_call": CALL}]}, "calls stand in 'tool_calls'"),
        (
            {"messages": [ASKED, SAID | {"content": [{"type": "tool_use", "name": "weather", "input": {}}]}]},
            "a part of type 'tool_use'",
        ),
        ({"messages": [ASKED, SAID | {"content": [{"type": "thinking", "thinking": "hm"}]}]}, "a part of type 'thinking'"),
        ({"conversations": [{"from": "judge", "value": "x"}]}, "a turn from 'judge'"),
    ],
)
def test_what_no_template_would_print_is_not_lost_in_silence(record, reason):
    with pytest.raises(Unusable, match=reason) as told:
        content_of(record, spec())
    assert not isinstance(told.value, Refused)  # one record of many, which is left out


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_flawed_records_are_told_and_the_others_read(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    texts = ["first", None, "", "last"]
    if suffix == "jsonl":
        lines = [json.dumps({"text": text}).encode() for text in texts]
        path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([*lines, b'{"text": "caf\xe9"}', b'{"text": ', b"[1]", b'{"other": 1}']))
    else:
        pa.parquet.write_table(pa.table({"text": texts}), path)
    found = list(read_documents([str(path)], spec()))
    assert [d.content for d in found[:4]] == ["first", "", "", "last"] and not any(d.unusable for d in found[:4])
    reasons = [
        "not UTF-8 text",
        "not JSON: Expecting value",
        "not a JSON object",
        "no field 'text' (data.text_key) and none of a chat",
    ]
    assert [d.unusable for d in found[4:]] == (reasons if suffix == "jsonl" else [])
    assert [d.index for d in read_documents([str(path)], spec(), 1, 3)] == list(range(1, len(found), 3))


def test_text_files_lose_what_is_no_text(tmp_path):
    (tmp_path / "bom.txt").write_bytes("\ufeffone\r\ntwo\rthree".encode())
    [document] = read_documents([str(tmp_path)], spec())
    assert document.content == "one\ntwo\nthree" and document.corpus == tmp_path.name


def test_parts_are_told_apart_and_a_file_comes_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    found = list(read_documents([str(tmp_path / "b.txt"), str(tmp_path)], spec()))
    assert [(d.content, d.part) for d in found] == [("b", 0), ("a", 1)]


def test_names_of_hub_data_sets(tmp_path, monkeypatch):
    found = {uri: hub_dataset(uri) for uri in ("hf://o/n", "hf://o/n:test", "o/n:train", "o/n:config:train")}
    assert [(d.name, d.config, d.split) for d in found.values()] == [
        ("o/n", None, "train"), ("o/n", None, "test"), ("o/n", None, "train"), ("o/n", "config", "train"),
    ]  # fmt: skip
    for uri in (
        "o/n",
        "folder/file.jsonl",
        "s3://b/x:y",
        "hf://datasets/o/n/data/*.parquet",
        "/a/b:c",
        "./a/b:c",
        "chats/*.jsonl",
    ):
        assert hub_dataset(uri) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "n:train").write_text("x")
    assert hub_dataset("o/n:train") is None  # what is there is a file


def test_where_there_is_no_hub_one_line_says_so(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(
        InputError, match=r"^hf://o/n: no such file .* the hub \(ConnectionError: no route\); where there is no hub"
    ):
        list(read_documents(["hf://o/n"], spec()))


def test_a_hub_data_set_is_streamed(monkeypatch):
    records = [{"text": "one"}, {"text": None}]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split, streaming: records)
    assert [(d.content, d.source, d.corpus) for d in read_documents(["o/n:train"], spec())] == [
        ("one", "o/n:train:0", "o/n"),
        ("", "o/n:train:1", "o/n"),
    ]


HELD_OUT = [
    ("absent.jsonl", "absent.jsonl: no such file"),
    ("table.csv", "table.csv: not a .txt, .jsonl or .parquet file"),
    ("titles.jsonl", "titles.jsonl:1: no field 'text' .data.text_key. and none of a chat"),
    ("pictures.jsonl", "pictures.jsonl:1: 'images' beside 'messages'"),
    ("train/b.jsonl", "train/b.jsonl is in data.train too"),
    ("./train/../train/*.jsonl", "train/a.jsonl is in data.train too"),
    ("train", "train/a.jsonl is in data.train too"),
]


@pytest.mark.parametrize("field", ["data.validation", "evaluation.texts"])
@pytest.mark.parametrize(("uri", "message"), HELD_OUT, ids=[uri for uri, _ in HELD_OUT])
def test_held_out_texts_that_cannot_serve_are_told_before_anything_is_read(tmp_path, monkeypatch, field, uri, message):
    """They would end a step after the training, or measure the student on what it has seen."""
    monkeypatch.chdir(tmp_path)
    Path("train").mkdir()
    lines = {"train/a": {"text": "a"}, "train/b": {"text": "b"}, "titles": {"title": "t"}, "good": {"text": "good"}}
    for name, line in (lines | {"pictures": {"messages": [ASKED], "images": ["x.png"]}}).items():
        Path(f"{name}.jsonl").write_text(json.dumps(line))
    Path("table.csv").write_text("text\nx\n")
    asked = {
        "name": "n", "student": {"model": "m"}, "teachers": [{"id": "t", "model": "m"}], "output": {"uri": "out"},
        "data": {"train": ["train/*.jsonl"], "validation": ["good.jsonl"]},
    }  # fmt: skip
    check_corpora(DistillationSpec.from_text(json.dumps(asked)))
    with pytest.raises(InputError, match=f"^{field}: [^\n]*{message}[^\n]*$"):
        check_corpora(DistillationSpec.from_text(json.dumps(asked), [f"{field}={uri}"]))


def test_one_hub_data_set_by_two_names_is_one(monkeypatch):
    monkeypatch.setattr(HubDataset, "records", lambda dataset: iter([(dataset.uri, {"text": "x"})]))
    asked = {
        "name": "n", "student": {"model": "m"}, "teachers": [{"id": "t", "model": "m"}], "output": {"uri": "out"},
        "data": {"train": ["hf://o/n"], "validation": ["o/n:test"]},
    }  # fmt: skip
    check_corpora(DistillationSpec.from_text(json.dumps(asked)))
    with pytest.raises(InputError, match="^data.validation: hf://o/n::train is in data.train too$"):
        check_corpora(DistillationSpec.from_text(json.dumps(asked), ["data.validation=o/n:train"]))
