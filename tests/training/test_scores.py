"""Scores: a teacher run once over the rows, and a training that reads them in its place."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.training_run import FIVE_STEPS, changed, losses, prepare
from xtoken_core.data.reading import load_rows
from xtoken_core.errors import InputError
from xtoken_core.models import load_model
from xtoken_core.spec import DistillationSpec
from xtoken_core.teachers import scoring
from xtoken_core.teachers.scores import Scores, part_file
from xtoken_core.training.distill import distill
from xtoken_core.training.inputs import TrainingInputs, by_teacher
from xtoken_core.workflow.scoring import score_teacher

VOCABULARY = 400


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("scores")


@pytest.fixture(scope="module")
def values(base):
    """A student and a teacher of its vocabulary, rows prepared; the KD compares fewer columns than the vocabulary has."""
    spec = prepare(base, training=FIVE_STEPS, loss={"temperature": 2.0, "vocab_topk": 64})
    return spec | {"teachers": spec["teachers"][1:]}


def scored(values, **scores):
    return values | {"teachers": [values["teachers"][0] | {"scores": scores}]}


def spec_of(values) -> DistillationSpec:
    return DistillationSpec.model_validate(values)


@pytest.fixture(scope="module")
def whole(base, values):
    """Scores of every token of the vocabulary."""
    folder = base / "whole"
    score_teacher(spec_of(scored(values, top_k=VOCABULARY)), "same", base / "rows", folder)
    return folder


def train(values, base, out, **scores):
    distill(spec_of(values), TrainingInputs((base / "rows",), scores=scores), out)
    return losses(out)


def test_what_is_stored_is_what_the_teacher_says(base, values, whole):
    rows, scores = load_rows(base / "rows" / "train"), Scores(whole)
    assert len(scores) == len(rows)
    model = load_model(values["teachers"][0]["model"])
    for index in (0, len(rows) - 1):
        ids = torch.tensor(rows[index]["student_ids"]).long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        values_, indices = scores.row(index)
        torch.testing.assert_close(torch.empty_like(logits).scatter_(1, indices.long(), values_), logits, rtol=1e-4, atol=1e-4)
        with safe_open(part_file(whole, 0), "pt") as file:
            first, last = file.get_tensor("starts")[index : index + 2].tolist()
            normaliser, realised = (file.get_tensor(name)[first:last] for name in ("log_normaliser", "realised"))
        torch.testing.assert_close(normaliser, (logits / 2.0).logsumexp(-1), rtol=1e-4, atol=1e-4)
        expected = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(realised, torch.cat([expected, torch.zeros(1)]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_with_the_whole_vocabulary_the_training_is_that_of_the_live_teacher(base, values, whole, packing, tmp_path):
    given = changed(values, data={"packing": packing})
    live = train(given, base, tmp_path / "live")
    read = train(scored(given), base, tmp_path / "read", same=(whole,))
    assert [line[0] for line in read] == [1, 2, 3, 4, 5]
    torch.testing.assert_close(torch.tensor(read), torch.tensor(live), rtol=1e-4, atol=1e-5)


def test_fewer_tokens_are_what_the_live_teachers_topk_transport_gives(base, values, tmp_path):
    score_teacher(spec_of(scored(values, top_k=16)), "same", base / "rows", tmp_path / "scores")
    teacher = values["teachers"][0] | {"transport": "topk", "top_k": 16}
    live = train(values | {"teachers": [teacher]}, base, tmp_path / "live")
    read = train(scored(values, uri=str(tmp_path / "scores")), base, tmp_path / "read")
    torch.testing.assert_close(torch.tensor(read), torch.tensor(live), rtol=1e-4, atol=1e-5)


def test_an_interrupted_scoring_goes_on_and_other_settings_begin_anew(base, values, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "PART_ROWS", 3)
    spec, rows = spec_of(scored(values, top_k=8)), base / "rows"
    tokens = score_teacher(spec, "same", rows, tmp_path)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 2
    before = [{name: tensor.clone() for name, tensor in load_file(part).items()} for part in parts]  # files are mapped
    parts[0].unlink()
    parts[2].write_bytes(parts[2].read_bytes()[:100])
    assert 0 < score_teacher(spec, "same", rows, tmp_path) < tokens
    for part, tensors in zip(parts, before, strict=True):
        torch.testing.assert_close(load_file(part), tensors, rtol=0, atol=0)
    assert score_teacher(spec, "same", rows, tmp_path) == 0
    assert score_teacher(spec_of(changed(scored(values, top_k=8), loss={"temperature": 1.0})), "same", rows, tmp_path) == tokens


def test_scores_that_do_not_belong_are_one_line(base, values, whole, tmp_path):
    read = scored(values)
    other = prepare(tmp_path / "other", data={"max_length": 32})
    cases = [
        (read, TrainingInputs((base / "rows",)), r"teachers\.0 \(same\): scores: 0 were given for 1 shards of rows"),
        (read, TrainingInputs((base / "rows",), scores={"same": (tmp_path,)}), "holds no scores"),
        (
            changed(read, data=other["data"]),
            TrainingInputs((tmp_path / "other" / "rows",), scores={"same": (whole,)}),
            r"teachers\.0 \(same\): scores: .*whole: made of other rows",
        ),
    ]
    for given, inputs, message in cases:
        with pytest.raises(InputError, match=message):
            distill(spec_of(given), inputs, tmp_path / "out")
    with pytest.raises(InputError, match="teacher: nobody: one of same has scores in the spec"):
        score_teacher(spec_of(read), "nobody", base / "rows", tmp_path / "none")
    with pytest.raises(InputError, match="scores: 1 folders were given for 1 teachers and 2 shards"):
        by_teacher(spec_of(changed(read, data={"shards": 2})), ["a"])


@pytest.mark.parametrize(
    ("sections", "teacher", "message"),
    [
        ({}, {"projection": {}}, "scores: serve a teacher with the student's vocabulary only"),
        ({}, {"transport": "logits"}, "scores: no process hands anything over"),
        ({}, {"scores": {"uri": "x", "top_k": 3}}, "scores.uri: stored scores are taken as they are"),
        ({"loss": {"weight_metric": "ce"}}, {}, "scores: serve aggregation: sum with fixed weights only"),
        ({"loss": {"aggregation": "select_teacher"}}, {}, "scores: serve aggregation: sum with fixed weights only"),
        ({"resources": {"nodes": 2}}, {}, "scores: train on one host only"),
        ({"data": {"shards": 2}}, {"scores": {"uri": "x"}}, "scores.uri: stored scores are of one shard"),
    ],
)
def test_what_scores_do_not_serve_is_refused_by_name(values, sections, teacher, message):
    given = changed(scored(values), **sections)
    given["teachers"] = [given["teachers"][0] | teacher]
    with pytest.raises(InputError) as caught:
        DistillationSpec.from_text(json.dumps(given))
    assert message in str(caught.value)
