"""What a hostile or broken data set, tokenizer or configuration holds: it is left out and counted, or refused in a line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipelines.status import Status, statuses
from tests.support.cli import call
from tests.support.report_sample import sample_run
from tests.support.tiny import tiny_model, tiny_run
from xtoken_core import storage
from xtoken_core.data.documents import Document, read_documents
from xtoken_core.data.records import MOST_MESSAGES
from xtoken_core.data.statistics import MOST_REASONS, Statistics
from xtoken_core.errors import InputError
from xtoken_core.models import load_model
from xtoken_core.report.run import Run
from xtoken_core.spec import DataSpec, DistillationSpec
from xtoken_core.tokenization import load_tokenizer
from xtoken_core.workflow.model_checks import check_models
from xtoken_core.workflow.plan import plan

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


def test_pipes_devices_and_links_are_no_files(tmp_path, fault, capsys):
    """Reading them may never end: each is named, also inside a folder, and by whatever reads it."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text('{"text": "good"}\n')
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    readers = {
        "data": lambda path: list(read_documents((path,), DataSpec(train="x"))),
        "a model or W": storage.local_copy,
        "a result": lambda path: Run.load(path),
        "a fingerprint": storage.fingerprint,
    }
    for what, read in readers.items():
        for path in ("pipe", "zero"):
            with pytest.raises(InputError, match=f"^{tmp_path}/{path}: is ") as told:
                read(str(tmp_path / path))
            fault(f"{path} given for {what}", "one line", told.value)
    for name, make in {"b.jsonl": os.mkfifo, "c.jsonl": lambda path: path.symlink_to("/dev/zero")}.items():
        make(texts / name)
        for read in (readers["data"], storage.local_copy, storage.fingerprint):
            with pytest.raises(InputError, match=f"^{texts}/{name}: is a pipe, a socket or a device") as told:
                read(str(texts))
        (texts / name).unlink()
        fault(f"a folder that holds a {'pipe' if name < 'c' else 'link to /dev/zero'}", "one line", told.value)
    (texts / "loop").symlink_to(texts)
    with pytest.raises(InputError, match=f"^{texts}/loop: is a link to a folder, which is not followed") as told:
        readers["data"](str(texts))
    fault("a folder of texts that links to itself", "one line", told.value)
    with pytest.raises(InputError, match="a spec is a mapping of fields"):
        DistillationSpec.from_yaml(tmp_path / "pipe")  # that nobody writes to; `<(...)` of a shell is one that somebody does
    (tmp_path / "runs" / "x").mkdir(parents=True)
    os.mkfifo(tmp_path / "runs" / "x" / "status.json")
    assert statuses(tmp_path / "runs") == []
    line = capsys.readouterr().err
    assert line.endswith("status.json: is not a file\n")
    fault("a pipe for status.json", "one line", line)


def test_a_chat_of_thousands_of_turns_is_left_out(tmp_path, fault):
    """Its time grows with the square of its turns: 6,000 took a quarter of an hour."""
    turns = [USER, {"role": "assistant", "content": "y"}] * (MOST_MESSAGES // 2)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in (turns, [*turns, USER])))
    good, bad = read_documents((str(tmp_path / "x.jsonl"),), DataSpec(train="x"))
    assert len(good.content.messages) == MOST_MESSAGES and bad.unusable == f"more than {MOST_MESSAGES} messages in one chat"
    fault("a chat of 1,001 messages", "left out and counted with its reason", bad.unusable)


@pytest.mark.parametrize("uri", ["data:,x", "simplecache::x", "s3://b/x::ftp://h/y", "zip::a.zip"])
def test_schemes_that_only_fsspec_knows_open_nothing(uri, fault):
    """Without `://` they are names of files; with it, they chain a file system that is not taken to one that is."""
    for look in (storage.local_copy, storage.fingerprint, lambda uri: storage.check_place(uri, "run")):
        with contextlib.suppress(InputError):
            look(uri)
        assert "://" in uri or storage.filesystem(uri) == (fsspec.filesystem("file"), os.path.abspath(uri))
    with pytest.raises(InputError, match=f"^{uri}: (no such file|holds ::)") as told:
        list(read_documents((uri,), DataSpec(train="x")))
    fault(f"data.train: {uri}", "one line", told.value)


def test_json_of_another_kind_than_an_option_takes(tmp_path):
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(tiny_run(tmp_path)))
    for option, value, told in (
        ("--modes", "[1]", "an object"),
        ("--scores", "5", "a list"),
        ("--scores", "[" * 100_000, "JSON"),
    ):
        done = call("components.distill", "--spec", spec, "--rows", tmp_path, "--run", tmp_path / "out", option, value)
        assert (done.returncode, done.stderr) == (2, f"{option}: not {told}\n")


@pytest.mark.parametrize("uri", ["hf://x", "hf://org/name:a:b:c", "hf://datasets/x", "hf://org/na me"])
def test_names_that_the_hub_cannot_have(uri, fault):
    with pytest.raises(InputError, match=f"^{uri}: ") as told:
        list(read_documents((uri,), DataSpec(train="x")))
    fault(f"data.train: {uri}", "one line", told.value)


def test_a_tokenizer_that_panics(base, tmp_path, fault):
    model = Path(edited(base, tmp_path / "m", "tokenizer_config.json"))
    told = json.loads((model / "tokenizer.json").read_text())
    told["model"]["continuing_subword_prefix"] = "##"
    (model / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=f"^{model}: cannot load a tokenizer: ") as refused:
        load_tokenizer(str(model))
    fault("a tokenizer on which the library panics", "one line that names it", refused.value)


@pytest.mark.parametrize(
    ("part", "field"),
    [("prepare", "rows"), ("prepare", "bytes"), ("prepare", "student_tokens"), ("summary", "tokens"), ("summary", "ranks")],
)
@pytest.mark.parametrize("value", [0, -5])
def test_a_plan_from_a_run_of_impossible_figures(tmp_path, part, field, value, fault):
    told = json.loads(sample_run(tmp_path).model_dump_json(exclude_none=True))
    (told["prepare"]["train"] if part == "prepare" else told["summary"])[field] = value
    (tmp_path / "run.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=rf"{field}: {value} is a figure of no finished run$") as refused:
        plan(DistillationSpec.model_validate(tiny_run(tmp_path / "tiny")), Run.load(tmp_path / "run.json"))
    fault(f"plan --from a run.json with {field}: {value}", "one line", refused.value)


@pytest.mark.parametrize("pid", [-1, 0, 2**31, 2**63])
def test_a_status_of_no_process(tmp_path, pid, capsys):
    (tmp_path / "x").mkdir()
    Status(name="n", pid=pid, begun=1.0, log="l", tasks=3).tell(tmp_path / "x")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "status.json").touch()  # as after a power cut: the others are told of all the same
    (told,) = statuses(tmp_path)
    assert told.state == "interrupted" and f"{tmp_path}/damaged/status.json: not JSON" in capsys.readouterr().err
