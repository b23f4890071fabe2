"""Records of every shape that people publish, and files with flaws."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from xtoken_core.data.documents import read_documents
from xtoken_core.data.hub import hub_dataset
from xtoken_core.data.records import Conversation, content_of
from xtoken_core.errors import InputError
from xtoken_core.spec import DataSpec

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
