"""Scores: a teacher run once over the rows, and a training that reads them in its place."""

from __future__ import annotations

import json
import shutil
import time
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from pipelines.warm import fork
from tests.support.chat_templates import CHATML
from tests.support.tiny import texts, tiny_tokenizer
from tests.support.training_run import FIVE_STEPS, changed, losses, prepare
from xtoken_core.data.reading import load_rows
from xtoken_core.errors import InputError
from xtoken_core.losses import CellCut
from xtoken_core.models import load_model
from xtoken_core.projection import Projection
from xtoken_core.spec import DistillationSpec
from xtoken_core.teachers import scoring
from xtoken_core.teachers.handle import Teacher
from xtoken_core.teachers.scores import Scores
from xtoken_core.training.distill import distill
from xtoken_core.training.inputs import TrainingInputs, by_teacher
from xtoken_core.workflow.scoring import score_teacher

EVERYTHING = 400
"""More than the student's tokens, or the cells of both vocabularies."""
BOTH = pytest.mark.parametrize("teacher", ["same", "other"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("scores")


@pytest.fixture(scope="module")
def run(base):
    """The spec of a run with a teacher of the student's vocabulary and another, its rows prepared; the KD of the former compares fewer columns
    than the vocabulary has."""
    return prepare(base, training=FIVE_STEPS, loss={"mode": "partition_kl", "temperature": 2.0, "vocab_topk": 64})


@pytest.fixture(scope="module")
def values(run):
    """The spec with the teacher of the student's vocabulary alone."""
    return of(run, "same")


def of(run, teacher):
    """The spec with one of the teachers."""
    return run | {"teachers": [t for t in run["teachers"] if t["id"] == teacher]}


def scored(values, **scores):
    return values | {"teachers": [values["teachers"][0] | {"scores": scores}]}


def spec_of(values) -> DistillationSpec:
    return DistillationSpec.model_validate(values)


@pytest.fixture(scope="module")
def all_scores(base, run):
    """By teacher, scores of every token of the vocabulary or of every cell."""
    for teacher in ("same", "other"):
        score_teacher(spec_of(scored(of(run, teacher), top_k=EVERYTHING)), teacher, base / "rows", base / f"whole-{teacher}")
    return {teacher: base / f"whole-{teacher}" for teacher in ("same", "other")}


@pytest.fixture(scope="module")
def whole(all_scores):
    return all_scores["same"]


def train(values, base, out, **scores):
    distill(spec_of(values), TrainingInputs((base / "rows",), projections={"other": base / "w.safetensors"}, scores=scores), out)
    return losses(out)


def test_what_is_stored_is_what_the_teacher_says(base, values, whole):
    rows, scores = load_rows(base / "rows" / "train"), Scores(whole)
    assert len(scores) == len(rows)
    model = load_model(values["teachers"][0]["model"])
    for index in (0, len(rows) - 1):
        ids = torch.tensor(rows[index]["student_ids"]).long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        row = scores.row(index)
        listed = row["values"] + row["log_sum"][:, None]
        torch.testing.assert_close(
            torch.empty_like(logits).scatter_(1, row["indices"].long(), listed), logits, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(row["log_normaliser"], (logits / 2.0).logsumexp(-1), rtol=1e-4, atol=1e-4)
        expected = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(row["realised"][:-1], expected, rtol=1e-4, atol=1e-4)


def test_of_another_vocabulary_cells_are_stored(base, run, tmp_path):
    """What the cut makes of the teacher's logits, row by row."""
    values = of(run, "other")
    score_teacher(spec_of(scored(values, top_k=8)), "other", base / "rows", tmp_path)
    rows, scores = load_rows(base / "rows" / "train"), Scores(tmp_path)
    cells = Projection.load(base / "w.safetensors").cells
    assert (scores.settings.cells, scores.settings.num_cells, scores.settings.top_k) == (cells.digest(), cells.num_cells, 8)
    model = load_model(values["teachers"][0]["model"])
    cut = CellCut.of(cells, scores.settings.vocab_size, 8, 2.0)
    for index in (0, len(rows) - 1):
        ids = torch.tensor(rows[index]["teacher_other_ids"]).long()[None]
        with torch.no_grad():
            expected = cut(model(ids).logits, ids)
        row = scores.row(index)
        told = {"values": expected.values, "rest": expected.rest, "total": expected.total, "own": expected.values[..., 0]}
        for name, tensor in (told | {"realised": expected.realised}).items():
            torch.testing.assert_close(row[name][:-1], tensor[0, :-1], rtol=1e-4, atol=1e-4)
        assert torch.equal(row["indices"][:-1, 0], expected.indices[0, :-1, 0])


@BOTH
@pytest.mark.parametrize("packing", [False, True])
def test_with_everything_listed_the_training_is_that_of_the_live_teacher(base, run, all_scores, teacher, packing, tmp_path):
    given = changed(of(run, teacher), data={"packing": packing})
    live = train(given, base, tmp_path / "live")
    read = train(scored(given), base, tmp_path / "read", **{teacher: (all_scores[teacher],)})
    assert [line[0] for line in read] == [1, 2, 3, 4, 5]
    torch.testing.assert_close(torch.tensor(read), torch.tensor(live), rtol=1e-4, atol=1e-5)


def test_fewer_tokens_are_what_the_live_teachers_topk_transport_gives(base, values, tmp_path):
    score_teacher(spec_of(scored(values, top_k=16)), "same", base / "rows", tmp_path / "scores")
    teacher = values["teachers"][0] | {"transport": "topk", "top_k": 16}
    live = train(values | {"teachers": [teacher]}, base, tmp_path / "live")
    read = train(scored(values, uri=str(tmp_path / "scores")), base, tmp_path / "read")
    torch.testing.assert_close(torch.tensor(read), torch.tensor(live), rtol=1e-4, atol=1e-5)


def test_of_chats_too(tmp_path):
    """Rows of which only the answers are targets, tokenized through a chat template on both sides."""
    turns = [[{"role": role, "content": text[:90]} for role, text in zip(("user", "assistant") * 2, texts(4))] for _ in range(3)]
    for name in ("chats", "more"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": m[n:]}) + "\n" for n, m in enumerate(turns)))
    with mock.patch("tests.support.tiny.tiny_tokenizer", lambda size: chatting(tiny_tokenizer(size))):
        data = {"train": [str(tmp_path / "chats.jsonl")], "format": "messages", "max_length": 256}
        data["validation"] = [str(tmp_path / "more.jsonl")]
        run = prepare(tmp_path, training=FIVE_STEPS, loss={"mode": "partition_kl"}, data=data)
    values = of(run, "other")
    masks = [row["student_mask"] for row in load_rows(tmp_path / "rows" / "train")]
    assert all(0 < sum(mask) < len(mask) for mask in masks)
    score_teacher(spec_of(scored(values, top_k=EVERYTHING)), "other", tmp_path / "rows", tmp_path / "scores")
    live = train(values, tmp_path, tmp_path / "live")
    read = train(scored(values), tmp_path, tmp_path / "read", other=(tmp_path / "scores",))
    torch.testing.assert_close(torch.tensor(read), torch.tensor(live), rtol=1e-4, atol=1e-5)


def chatting(tokenizer):
    tokenizer.chat_template = CHATML
    return tokenizer


@BOTH
def test_no_teacher_process_starts(base, run, all_scores, teacher, tmp_path):
    """Neither does the training load the teacher's weights: they are not there."""
    values = of(run, teacher)
    gone = tmp_path / "teacher"
    shutil.copytree(values["teachers"][0]["model"], gone)
    (gone / "model.safetensors").unlink()
    values["teachers"] = [values["teachers"][0] | {"model": str(gone)}]
    with mock.patch.object(Teacher, "__init__", side_effect=AssertionError("a teacher was started")):
        train(scored(values), base, tmp_path / "out", **{teacher: (all_scores[teacher],)})
        with pytest.raises(AssertionError, match="a teacher was started"):
            train(values, base, tmp_path / "live")


def test_an_interrupted_scoring_goes_on_and_other_settings_begin_anew(base, values, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "PART_ROWS", 3)
    spec, rows = spec_of(scored(values, top_k=8)), base / "rows"
    tokens = score_teacher(spec, "same", rows, tmp_path)
    parts = sorted(tmp_path.glob("part-*"))
    assert len(parts) > 2
    before = [{name: tensor.clone() for name, tensor in load_file(part).items()} for part in parts]  # files are mapped
    parts[0].unlink()
    parts[2].write_bytes(parts[2].read_bytes()[:100])
    assert 0 < score_teacher(spec, "same", rows, tmp_path) < tokens
    for part, tensors in zip(parts, before, strict=True):
        torch.testing.assert_close(load_file(part), tensors, rtol=0, atol=0)
    assert score_teacher(spec, "same", rows, tmp_path) == 0
    assert score_teacher(spec_of(changed(scored(values, top_k=8), loss={"temperature": 1.0})), "same", rows, tmp_path) == tokens


def score_by_row(values, rows, folder, parts=None):
    """A part for each row; nothing more happens after so many parts, for ever."""
    write = scoring.write_part

    def write_part(*arguments):
        write(*arguments)
        while len(list(folder.glob("*.safetensors"))) == parts:
            time.sleep(1)

    with mock.patch.multiple(scoring, PART_ROWS=1, write_part=write_part):
        return score_teacher(spec_of(values), "other", rows, folder)


def test_a_killed_scoring_is_resumed_and_gives_the_same(base, run, tmp_path):
    """SIGKILL with some parts written: those are kept, and the others are made."""
    values, rows = scored(of(run, "other"), top_k=8), base / "rows"
    process, _ = fork(score_by_row, values, rows, tmp_path / "killed", 2)
    while len(list((tmp_path / "killed").glob("*.safetensors"))) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.safetensors")}
    tokens = score_by_row(values, rows, tmp_path / "whole")
    assert 0 < score_by_row(values, rows, tmp_path / "killed") < tokens and len(kept) == 2 < len(load_rows(rows / "train"))
    for path in sorted((tmp_path / "whole").glob("part-*")):
        again = tmp_path / "killed" / path.name
        torch.testing.assert_close(load_file(again), load_file(path), rtol=1e-5, atol=1e-5)
        assert again.stat().st_mtime_ns == kept.get(path.name, again.stat().st_mtime_ns)


def test_scores_that_do_not_belong_are_one_line(base, run, values, all_scores, whole, tmp_path):
    read = scored(values)
    other = prepare(tmp_path / "other", data={"max_length": 32})
    cases = [
        (read, TrainingInputs((base / "rows",)), r"teachers\.0 \(same\): scores: 0 were given for 1 shards of rows"),
        (read, TrainingInputs((base / "rows",), scores={"same": (tmp_path,)}), "holds no scores"),
        (
            changed(read, data=other["data"]),
            TrainingInputs((tmp_path / "other" / "rows",), scores={"same": (whole,)}),
            r"teachers\.0 \(same\): scores: .*whole-same: made of other rows",
        ),
    ]
    for given, inputs, message in cases:
        with pytest.raises(InputError, match=message):
            distill(spec_of(given), inputs, tmp_path / "out")
    cold = changed(scored(of(run, "other")), loss={"temperature": 1.0})
    with pytest.raises(InputError, match=r"teachers\.0 \(other\): scores: made for loss.temperature 2, and this run's is 1"):
        train(cold, base, tmp_path / "out", other=(all_scores["other"],))
    with pytest.raises(InputError, match="teacher: nobody: one of same has scores in the spec"):
        score_teacher(spec_of(read), "nobody", base / "rows", tmp_path / "none")
    with pytest.raises(InputError, match="scores: 1 folders were given for 1 teachers and 2 shards"):
        by_teacher(spec_of(changed(read, data={"shards": 2})), ["a"])


@pytest.mark.parametrize(
    ("sections", "teacher", "message"),
    [
        ({}, {"projection": {"learnable": True}}, "scores: projection.learnable needs the running teacher"),
        ({"loss": {"mode": "p_kl"}}, {"projection": {}}, "scores: p_kl needs the running teacher"),
        ({}, {"projection": {}, "mode": "gold"}, "scores: gold needs the running teacher; with a projection they serve"),
        ({}, {"transport": "logits"}, "scores: no process hands anything over"),
        ({}, {"scores": {"uri": "x", "top_k": 3}}, "scores.uri: stored scores are taken as they are"),
        ({"loss": {"weight_metric": "ce"}}, {}, "scores: serve aggregation: sum with fixed weights only"),
        ({"loss": {"aggregation": "select_teacher"}}, {}, "scores: serve aggregation: sum with fixed weights only"),
        ({"data": {"shards": 2}}, {"scores": {"uri": "x"}}, "scores.uri: stored scores are of one shard"),
    ],
)
def test_what_scores_do_not_serve_is_refused_by_name(values, sections, teacher, message):
    given = changed(scored(values), **sections)
    given["teachers"] = [given["teachers"][0] | teacher]
    with pytest.raises(InputError) as caught:
        DistillationSpec.from_text(json.dumps(given))
    assert message in str(caught.value)
