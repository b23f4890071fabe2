"""Bad input by the hundred, made from good input: each is taken or refused in lines that name it; none is a traceback or a hang."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets.arrow_writer import ArrowWriter
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet

from tests.support.cli import call
from tests.support.examples import examples
from tests.support.report_sample import sample_run
from xtoken_core.data.documents import read_documents
from xtoken_core.data.reading import load_rows
from xtoken_core.errors import InputError
from xtoken_core.projection import Projection
from xtoken_core.report.compare import render_comparison
from xtoken_core.report.run import Run
from xtoken_core.spec import DataSpec, DistillationSpec
from xtoken_core.spec.text import parse_text

pytestmark = pytest.mark.timeout(300)

SPECS = sorted(Path("pipelines/specs").glob("*.yaml"))

VALUES: list[Any] = [
    None, "", " ", "x", "-", "0", "é", "../..", "s3://", "ftp://h/x", "s3://K:S@b/x", "a\0b", "\ud800", "x" * 5000, True, 0, -1,
    1.5, 10**9, 10**30, -(10**400), 1e308, float("inf"), float("nan"), [], [[]], [None], ["x", "x"], {}, {"x": 1},
    {"": {}}, {"a": {"b": {"c": [[[{}]]]}}},
]  # fmt: skip
"""What a field is not, most of the time."""

MANY = [list(range(20_000)), [{"id": "a", "model": "b"}] * 2000, {str(key): key for key in range(5000)}]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON value, its own left out."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(item, (*path, key))


def replaced(value: Any, path: tuple, by: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = by
    return value


def outcome(load: Callable[[], Any]) -> str:
    """`taken` or `refused`; whatever else is raised is the fault. A refusal is made of lines that say something."""
    try:
        load()
    except InputError as e:
        lines = str(e).splitlines()
        assert lines and all(line.strip() and len(line) < 2000 for line in lines)
        return "refused"
    return "taken"


def test_specs_with_one_value_changed():
    ended: Counter[str] = Counter()
    everything = {name: section for path in SPECS for name, section in parse_text(path.read_text(), path.name).items()}
    everything |= {"loss": {"mode": "gold", "alpha": 1.0}, "resources": {"secrets": [{"secret": "s", "key": "k", "env": "E"}]}}
    assert outcome(lambda: DistillationSpec.from_text(json.dumps(everything))) == "taken"
    given = list(places(everything))
    defaults = DistillationSpec.from_text(json.dumps(everything)).model_dump(mode="json")
    others = [path for path in places(defaults) if path not in given and path[:-1] in given]
    assert ("training", "skip_nonfinite") in others
    for turn, path in enumerate(given + others):
        share = 2 if path in given else 6
        for value in VALUES[turn % share :: share] + MANY * (len(path) == 1):  # some of them, in turn
            changed = replaced(everything, path, value)
            ended[outcome(lambda changed=changed: DistillationSpec.from_text(json.dumps(changed)))] += 1
            dotted = ".".join(map(str, path))
            if isinstance(value, str | None) and str(value) in ("None", "x", "s3://", "../.."):
                override = f"{dotted}={value!s}"
                ended[outcome(lambda override=override: DistillationSpec.from_text(json.dumps(everything), [override]))] += 1
    print(f"specs: {dict(ended)}")
    assert ended["refused"] >= 500 and ended["taken"] > 20


ALPHABET = "[]{}:,-?&*!|>'\"%@`#\n\t \\~<=0aé\0\x85\u2028\ud800."


@examples(150)
@given(
    st.sampled_from(SPECS),
    st.lists(st.tuples(st.floats(0, 1), st.text(st.sampled_from(ALPHABET), max_size=5), st.integers(0, 9)), max_size=6),
)
@example(SPECS[0], [(0.0, "&a [*a]", 3)])
def test_specs_with_pieces_of_text_changed(path, edits):
    text = path.read_text(encoding="utf-8")
    for where, piece, deleted in edits:
        at = int(where * len(text))
        text = text[:at] + piece + text[at + deleted :]
    outcome(lambda: DistillationSpec.from_text(text))


@examples(60)
@given(
    st.text(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    ).map(json.dumps)
)
def test_any_text_as_a_spec_and_as_an_override(text):
    outcome(lambda: DistillationSpec.from_text(text))
    outcome(lambda: DistillationSpec.from_yaml(SPECS[0], [f"data.train={text}"]))
    outcome(lambda: DistillationSpec.from_yaml(SPECS[0], [text]))


def damaged(data: bytes, count: int) -> Iterator[bytes]:
    """A file's bytes cut, extended, emptied, and with bytes changed at `count` places, most of them near the ends, where headers are."""
    chance = random.Random(len(data))
    yield from (
        b"",
        b"\0" * len(data),
        data + b"x",
        b"\xff" * 8 + data[8:],
        data[::-1],
        b"{" * 100_000,
        b"[" * 100_000,
        b"null",
        b"[]",
        b"{}",
    )
    for _ in range(count):
        span = chance.choice([64, 512, len(data)])
        at = chance.choice([chance.randrange(min(span, len(data))), -1 - chance.randrange(min(span, len(data)))]) % len(data)
        yield data[:at]
        yield data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """A small valid file of every kind that a run reads, and what reads it."""
    folder = tmp_path_factory.mktemp("files")
    w = Projection(torch.tensor([[0, -1], [1, 2], [-1, -1]]), torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.0, 0.0]]), 3)
    w.save(folder / "w.safetensors", "student", "teacher")
    w.to_nemo_rl(folder / "w.pt")
    (folder / "text.jsonl").write_text('{"text": "one é"}\n\n{"text": "two"}\n')
    (folder / "chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    (folder / "plain.txt").write_text("naïve")
    parquet.write_table(pa.table({"text": ["one", "two", None]}).slice(0, 2), folder / "table.parquet")
    sample_run(folder).save(folder / "run.json")
    rows = {"document": [0, 1], "student_ids": [[1, 2, 3], [4]], "text": ["one", "naïve"]}
    writer = ArrowWriter(path=str(folder / "rows.arrow"))
    writer.write_table(pa.table(rows))
    writer.finalize()
    return {
        "rows": (folder / "rows.arrow", lambda p: list(load_rows(p.parent))),
        "W": (folder / "w.safetensors", lambda p: Projection.load(p)),
        "W of NeMo-RL": (folder / "w.pt", lambda p: Projection.from_nemo_rl(p, 3, 3)),
        "texts": (folder / "text.jsonl", lambda p: list(read_documents((str(p),), DataSpec(train="x")))),
        "chats": (folder / "chat.jsonl", lambda p: list(read_documents((str(p),), DataSpec(train="x", format="messages")))),
        "text": (folder / "plain.txt", lambda p: list(read_documents((str(p),), DataSpec(train="x")))),
        "tables": (folder / "table.parquet", lambda p: list(read_documents((str(p),), DataSpec(train="x")))),
        "finished runs": (folder / "run.json", Run.load),
    }


KINDS = ("rows", "W", "W of NeMo-RL", "texts", "chats", "text", "tables", "finished runs")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, files, tmp_path):
    path, load = files[kind]
    assert outcome(lambda: load(path)) == "taken"
    ended: Counter[str] = Counter()
    for data in damaged(path.read_bytes(), 60):
        (tmp_path / path.name).write_bytes(data)
        ended[outcome(lambda: load(tmp_path / path.name))] += 1
    print(f"{kind}: {dict(ended)}")
    assert ended["refused"] > 20 or kind in ("texts", "chats", "text")  # of which what is bad is left out and counted


def test_finished_runs_with_one_value_changed(tmp_path):
    """What someone else's run.json holds is drawn beside a run of one's own, or refused."""
    own = sample_run(tmp_path)
    whole = json.loads(own.model_dump_json(exclude_none=True))
    changes = [(path, value) for path in places(whole) for value in (None, "x", -1, [], {}, 1e308, 10**400)]
    ended: Counter[str] = Counter()
    for path, value in random.Random(0).sample(changes, 40):
        (tmp_path / "run.json").write_text(json.dumps(replaced(whole, path, value)))
        ended[outcome(lambda: render_comparison([own, Run.load(tmp_path / "run.json")]))] += 1
    assert ended["refused"] > 10 and ended["taken"] > 5


PATHS = (
    "absent",
    "/proc/absent/x",
    "/dev/null/x",
    "",
    "~nobody/x",
    "s3://K:PLANTED@b/x",
    "ftp://h/x",
    "nope://x",
    "x" * 300,
)
"""What is no path, for one reason or another."""


def command_lines(spec: str) -> Iterator[list[str]]:
    """Command lines with something wrong in each."""
    for verb in ("validate", "compile", "run", "submit"):
        yield from [[verb]] * (verb != "compile")  # without a spec it compiles those of the repository
        yield [verb, spec, "--nonsense"]
        yield from ([verb, path] for path in PATHS)
        yield from (
            [verb, spec, "--set", change]
            for change in ("", "=", "a", "a=b", "a.b=c", "..=1", "teachers.9.id=x", "name={", f"name={'[' * 99}")
        )
    yield from (["compile", spec, "-o", path] for path in PATHS[1:3])
    yield from (["run", spec, "--runs", path] for path in (spec, *PATHS[1:3]))
    yield from (["compare", path] for path in (spec, *PATHS))
    yield from (["tokenizers", path, "--output", "out"] for path in PATHS[1:])


COMPONENTS = {
    "overlap": ["report"], "projection": ["matrices"], "prepare": ["rows"], "distill": ["rows", "run"], "report": ["page"],
    "evaluate": ["group", "results"], "resolve": [],
}  # fmt: skip


def component_lines(spec: str) -> Iterator[list[str]]:
    for name, options in COMPONENTS.items():
        yield [name]
        for path in PATHS if name in ("overlap", "distill") else PATHS[1:3]:
            yield [name, "--spec", path, *(part for option in options for part in (f"--{option}", "out"))]
            for wrong in set(options) - {"group"}:
                yield [
                    name,
                    "--spec",
                    spec,
                    *(part for option in options for part in (f"--{option}", path if option == wrong else "out")),
                ]


def test_command_lines(tmp_path, monkeypatch):
    spec = {
        "name": "n", "student": {"model": "./absent-student"}, "teachers": [{"id": "t", "model": "./absent-teacher"}],
        "data": {"train": ["absent-text"]}, "output": {"uri": str(tmp_path / "output")},
    }  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    monkeypatch.chdir(tmp_path)
    lines = [("pipelines", line) for line in command_lines("spec.json")]
    lines += [(f"components.{line[0]}", line[1:]) for line in component_lines("spec.json")]
    wrong = []
    for program, arguments in lines:
        try:
            done = call(program, *arguments)
        except Exception as e:
            wrong.append((program, arguments, repr(e)[:300]))
            continue
        if (
            done.returncode != 2
            or not done.stderr.strip()
            or "Traceback" in done.stderr
            or "PLANTED" in done.stderr + done.stdout
        ):
            wrong.append((program, arguments, done))
    assert wrong == []
    print(f"command lines: {len(lines)} refused")
