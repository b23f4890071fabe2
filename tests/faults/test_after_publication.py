"""Checkpoints go when the run is published, and never before."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.training_run import FIVE_STEPS, changed, prepare, run
from xtoken_core.errors import InputError, RunError
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.publish import Parts, finish
from xtoken_core.workflow.vocabularies import overlap_report


@dataclass
class Written:
    """What a step has left."""

    path: str
    uri: str = "here"
    metadata: dict[str, Any] = field(default_factory=dict)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.fixture
def trained(tmp_path):
    """A spec, a trained run, and the folder of its checkpoints."""
    values = prepare(tmp_path, teachers=1, training=FIVE_STEPS)
    run(values, tmp_path, tmp_path / "run", checkpoint_uri=str(tmp_path / "kept"))
    overlap_report(DistillationSpec.model_validate(values)).write(tmp_path / "overlap.json")
    parts = Parts(*(Written(str(tmp_path / name)) for name in ("overlap.json", "rows", "run")))
    assert kept(tmp_path / "kept")
    return values, parts, tmp_path / "kept"


def test_checkpoints_stay_until_the_run_is_published(trained, tmp_path, fault):
    values, parts, folder = trained
    before = kept(folder)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("mine")
    taken = changed(values, output={"uri": str(tmp_path / "theirs")})
    with pytest.raises(InputError, match="^output.uri: .*holds other things") as told:
        finish(DistillationSpec.model_validate(taken), parts, tmp_path / "page.html")
    assert kept(folder) == before and (tmp_path / "theirs" / "thesis.tex").read_text() == "mine"
    fault("publishing fails", "every checkpoint stays", told.value)
    finish(DistillationSpec.model_validate(values), parts, tmp_path / "page.html")
    assert kept(folder) == [] and (Path(values["output"]["uri"]) / "student" / "best" / "config.json").exists()
    fault("the run is published", "its checkpoints go, and only then", "removed after the publication")


def test_a_student_that_was_damaged_is_not_published_and_its_checkpoints_stay(trained, tmp_path, fault):
    values, parts, folder = trained
    before = kept(folder)
    weights = tmp_path / "run" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RunError, match="best/model.safetensors is not as it was written") as told:
        finish(DistillationSpec.model_validate(values), parts, tmp_path / "page.html")
    assert kept(folder) == before and not Path(values["output"]["uri"]).exists()
    fault("the student is damaged before it is published", "not published, every checkpoint stays", told.value)
