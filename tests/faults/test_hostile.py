"""What a hostile or broken data set, tokenizer or configuration holds: it is left out and counted, or refused in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.support.tiny import tiny_model, tiny_run
from xtoken_core.data.documents import Document, read_documents
from xtoken_core.data.statistics import MOST_REASONS, Statistics
from xtoken_core.errors import InputError
from xtoken_core.models import load_model
from xtoken_core.spec import DataSpec, DistillationSpec
from xtoken_core.tokenization import load_tokenizer
from xtoken_core.workflow.model_checks import check_models

USER = {"role": "user", "content": "x"}


def nested(levels: int) -> Any:
    value: Any = 5
    for _ in range(levels):
        value = [value]
    return value


LINES = {
    "a prompt that is a number": {"prompt": 5, "completion": "x"},
    "a number of 5000 digits": '{"text": "a", "n": ' + "1" * 5000 + "}",
    "tools nested 100,000 deep": {"messages": [USER], "tools": "[" * 100_000},
    "a tool's name that is half a character": '{"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "\\ud800"}]}',
    "a key that is half a character": '{"messages": [{"role": "user", "content": "x", "\\ud800": 1}]}',
    "a function call nested 100,000 deep": {"conversations": [{"from": "function_call", "value": "[" * 100_000}]},
    "tool calls nested 200 deep": {"messages": [{"role": "assistant", "content": "x", "tool_calls": nested(200)}]},
    "train: 'false', a text": {"messages": [USER | {"train": "false"}]},
    "a weight that is a list": {"messages": [USER | {"weight": [1]}]},
    "a line nested 100,000 deep": "[" * 100_000,
    "a line that is not UTF-8": b'{"text": "\xff"}',
    "a system prompt that is an object": {"conversations": [{"from": "human", "value": "x"}], "system": {"a": 1}},
}


@pytest.mark.parametrize("what", LINES)
def test_a_bad_line_is_left_out_with_a_reason(what, tmp_path, fault):
    line = LINES[what]
    data = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n' + data + b"\n")
    good, bad = read_documents((str(tmp_path / "x.jsonl"),), DataSpec(train="x"))
    assert good.content == "good" and bad.unusable
    fault(what, "left out and counted with its reason", bad.unusable)


def test_values_that_python_cannot_hold(tmp_path, fault):
    times = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("at", pa.timestamp("s", tz="No/Where"))]))
    columns = {
        "a duration beyond Python's": ("text", pa.array([2**62], type=pa.duration("s"))),
        "an unknown time zone": ("messages", pa.array([[USER | {"at": 5}]], type=times)),
    }
    for what, (column, values) in columns.items():
        parquet.write_table(pa.table({column: values}), tmp_path / "x.parquet")
        (document,) = read_documents((str(tmp_path / "x.parquet"),), DataSpec(train="x"))
        assert document.unusable.startswith("a value that Python cannot hold")
        fault(f"{what} in parquet", "left out and counted with its reason", document.unusable)


def test_reasons_that_repeat_the_data_are_bounded(capsys, fault):
    statistics = Statistics([])
    for number in range(1000):
        reason = f"\x1b[2Jturn from {number} " + "x" * 10_000
        statistics.drop(Document(number, "c", "file\r:1", ""), reason, unusable=True)
    told = capsys.readouterr().err
    assert len(statistics.dropped) == MOST_REASONS + 1 and sum(statistics.dropped.values()) == 1000
    assert len(told) < 50_000 and "\x1b" not in told and "\r" not in told
    fault(
        "1000 documents, each with a reason of its own, of escape sequences",
        "bounded, printed as text",
        f"{len(told)} characters",
    )


def test_an_error_line_obeys_no_terminal(tmp_path, fault):
    with pytest.raises(InputError) as told:
        list(read_documents((str(tmp_path / "a\x1b[2J\rb\u202e.txt"),), DataSpec(train="x")))
    assert "a\\x1b[2J\\rb\\u202e.txt" in str(told.value)
    fault("a file name of escape sequences", "printed as text", told.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "base", 400)


def edited(base: Path, folder: Path, file: str, **changes: Any) -> str:
    shutil.copytree(base, folder)
    told = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(told))
    return str(folder)


def test_a_tokenizer_of_another_class(base, tmp_path, fault):
    model = edited(base, tmp_path / "m", "tokenizer_config.json", tokenizer_class="BertTokenizer")
    with pytest.raises(InputError, match=f"^{model}: cannot load a tokenizer: .*WordPiece") as told:
        load_tokenizer(model)
    fault("a BPE that says it is a BertTokenizer", "one line that names it", told.value)


def test_a_dropout_that_cannot_be(base, tmp_path, fault):
    model = edited(base, tmp_path / "m", "config.json", attention_dropout=5)
    with pytest.raises(InputError, match=f"^{model}: cannot load the model: attention_dropout: 5$") as told:
        load_model(model)
    fault("attention_dropout: 5, which only training sees", "one line before any training", told.value)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"output_attentions": True}),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default", "template": "x"}, {"name": "../../evil", "template": "y"}]},
        ),
    ],
)
def test_what_could_not_be_saved_in_the_end_is_known_at_the_beginning(tmp_path, fault, file, changes):
    values = tiny_run(tmp_path)
    model = edited(Path(values["student"]["model"]), tmp_path / "m", file, **changes)
    spec = DistillationSpec.model_validate(values | {"student": {"model": model}})
    with pytest.raises(InputError, match=f"^student.model: {model}: cannot be saved after the training: ") as told:
        check_models(spec)
    assert not list(tmp_path.parent.glob("evil*"))
    fault(
        f"{next(iter(changes))} in {file}, which transformers refuses to save", "said by resolve, before any training", told.value
    )
