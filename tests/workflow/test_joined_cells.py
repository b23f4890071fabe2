"""Cells that the training rows join: in every W that a run builds, the same however the rows are split, and in the scores of that W."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.tiny import tiny_run
from tests.support.training_run import changed
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.errors import InputError
from xtoken_core.partition import Partition
from xtoken_core.projection import Projection
from xtoken_core.report.facts import teacher_facts
from xtoken_core.report.run import Run
from xtoken_core.results.vocabulary import ProjectionStats
from xtoken_core.spec import DistillationSpec
from xtoken_core.training.distill import distill
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.workflow import vocabularies
from xtoken_core.workflow.scoring import score_teacher
from xtoken_core.workflow.vocabularies import matrices, overlap_report, write_projections


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("joined")


@pytest.fixture(scope="module")
def values(base: Path) -> dict[str, Any]:
    """A run's spec with rows of one shard and of three, in `base`/SHARDS-SHARD."""
    values = changed(tiny_run(base, teachers=1), loss={"mode": "partition_kl"})
    for shards in (1, 3):
        for shard in range(shards):
            prepare_rows(parsed(values, data={"shards": shards}), base / f"{shards}-{shard}" / "train", "train", shard)
    return values


def parsed(values: dict[str, Any], **sections: dict[str, Any]) -> DistillationSpec:
    return DistillationSpec.model_validate(changed(values, **sections))


def written(spec: DistillationSpec, folder: Path, *rows: Path) -> tuple[Partition, ProjectionStats]:
    """Cells and figures of the W that is built with some rows."""
    write_projections(spec, folder, [str(row) for row in rows])
    cells = Projection.load(folder / "other.safetensors").cells
    assert cells is not None
    return cells, ProjectionStats.read(folder / "other.json")


def test_w_is_the_same_however_the_rows_are_split(base, values, tmp_path, capsys):
    spec = parsed(values)
    alone, told = written(spec, tmp_path / "alone")
    assert told.joined is None and capsys.readouterr().out == ""
    one, stats = written(spec, tmp_path / "one", base / "1-0")
    assert written(spec, tmp_path / "three", base / "3-2", base / "3-0", base / "3-1")[0].digest() == one.digest()
    joined = stats.joined
    assert joined is not None and (joined.cells, joined.left) == (alone.num_cells, one.num_cells)
    assert one.num_cells < alone.num_cells and 0 <= joined.apart_left < joined.apart < 0.5 and joined.chunks > 100
    assert capsys.readouterr().out.startswith(f"other: {alone.num_cells:,} cells, {one.num_cells:,} once joined by the rows; ")
    w, without = (Projection.load(tmp_path / name / "other.safetensors") for name in ("one", "alone"))
    assert torch.equal(w.indices, without.indices) and torch.equal(w.weights, without.weights)


def test_other_text_makes_another_w(base, values, tmp_path):
    (tmp_path / "a.txt").write_text("One line of text. " * 9)
    spec = parsed(values, data={"train": [str(tmp_path / "a.txt")]})
    prepare_rows(spec, tmp_path / "rows" / "train")
    before, _ = written(parsed(values), tmp_path / "before", base / "1-0")
    after, _ = written(spec, tmp_path / "after", tmp_path / "rows")
    assert before.digest() != after.digest()


def test_a_stored_w_is_taken_as_it_is(base, values, tmp_path):
    alone, _ = written(parsed(values), tmp_path / "alone")
    stored = values["teachers"][0] | {"projection": {"uri": str(tmp_path / "alone" / "other.safetensors")}}
    cells, stats = written(parsed(values | {"teachers": [stored]}), tmp_path / "again", base / "1-0")
    assert cells.digest() == alone.digest() and stats.joined is None


def test_counts_are_fetched_once_for_all_teachers(base, values, tmp_path, monkeypatch):
    """Of a store that takes seconds, and for no W that is stored."""
    fetched = mock.Mock(wraps=vocabularies.local_copy)
    monkeypatch.setattr(vocabularies, "local_copy", fetched)
    other = values["teachers"][0]
    both = parsed(values | {"teachers": [other, other | {"id": "again"}]})
    prepare_rows(both, tmp_path / "rows" / "train")
    write_projections(both, tmp_path / "w", [str(tmp_path / "rows")])
    assert fetched.call_count == 1
    stored = other | {"projection": {"uri": str(tmp_path / "w" / "other.safetensors")}}
    write_projections(parsed(values | {"teachers": [stored]}), tmp_path / "stored", ["no rows are read"])
    assert fetched.call_count == 1


def test_rows_that_do_not_fit_are_one_line(base, values, tmp_path):
    swapped = values | {"teachers": [values["teachers"][0] | {"model": str(base / "student")}]}
    with pytest.raises(InputError, match="^rows: prepared for other vocabularies than those of the student and other$"):
        write_projections(parsed(swapped), tmp_path, [str(base / "1-0")])
    with pytest.raises(InputError, match="absent/train/first_tokens.safetensors: no such file or folder$"):
        write_projections(parsed(values), tmp_path, [str(tmp_path / "absent")])


def test_scores_are_of_the_cells_of_w(base, values, tmp_path):
    """Those of the vocabularies alone are refused beside a W with joined cells."""
    scored = values | {"teachers": [values["teachers"][0] | {"scores": {"top_k": 8}}]}
    spec = parsed(scored)
    write_projections(spec, tmp_path / "w", [str(base / "1-0")])
    w = matrices(spec, tmp_path / "w")
    for name, given in (("joined", w["other"]), ("alone", None)):
        score_teacher(spec, "other", base / "1-0", tmp_path / name, given)

    def train(scores: Path) -> None:
        inputs = TrainingInputs((base / "1-0",), projections=w, scores={"other": (scores,)})
        distill(parsed(scored, data={"validation": []}), inputs, tmp_path / "out")

    train(tmp_path / "joined")
    with pytest.raises(
        InputError, match=r"^teachers\.0 \(other\): scores: made for other cells than those of W; score again with it"
    ):
        train(tmp_path / "alone")


def test_the_report_tells_what_was_joined(base, values, tmp_path):
    spec = parsed(values)
    _, stats = written(spec, tmp_path, base / "1-0")
    told = {}
    for mode in ("partition_kl", "p_kl"):
        overlap = overlap_report(parsed(values, loss={"mode": mode}))
        run = Run(format=1, spec=spec.model_dump(mode="json"), overlap=overlap, projections={"other": stats})
        told[mode] = dict(teacher_facts(run, run.spec["teachers"][0]))
    assert stats.joined is not None
    assert told["partition_kl"]["cells"] == f"{stats.joined.cells:,}, {stats.joined.left:,} once joined by the training text"
    assert told["partition_kl"]["chunks whose first tokens lie in different cells"].endswith(" before they were joined")
    assert "cells" not in told["p_kl"]  # which does not read them
