"""Scores that are damaged, incomplete or not what they claim: found before the first step, by name, and never trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipelines.local import _forget_damaged
from tests.support.training_run import FIVE_STEPS, changed, prepare
from xtoken_core.checksums import FILE, note
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.data.reading import rows_of_shards
from xtoken_core.errors import InputError, RunError
from xtoken_core.spec import DistillationSpec
from xtoken_core.teachers import scoring
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.training.scored import rows_check, scored_teachers
from xtoken_core.workflow.scoring import score_teacher


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("scores")


@pytest.fixture(scope="module")
def values(base):
    run = prepare(base, teachers=1, training=FIVE_STEPS, loss={"mode": "partition_kl"})
    return run | {"teachers": [run["teachers"][0] | {"scores": {"top_k": 8}}]}


@pytest.fixture(scope="module")
def whole(base, values):
    """Scores in several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "PART_ROWS", 3)
        score(values, base, base / "whole")
    assert len(list((base / "whole").glob("part-*"))) > 2
    return base / "whole"


def score(values, base, folder, **scores) -> int:
    teacher = values["teachers"][0]
    spec = DistillationSpec.model_validate(values | {"teachers": [teacher | {"scores": teacher["scores"] | scores}]})
    return score_teacher(spec, "other", base / "rows", folder)


def read(values, base, folder, own=True):
    """What a training takes of scores, before it loads any model: those that its run has made, or those of a URI."""
    if own:
        spec, scores = DistillationSpec.model_validate(values), {"other": (folder,)}
    else:
        teacher = values["teachers"][0] | {"scores": {"uri": str(folder)}}
        spec, scores = DistillationSpec.model_validate(values | {"teachers": [teacher]}), {}
    return scored_teachers(spec, TrainingInputs((base / "rows",), {}, {}, scores))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


HARM = {flip: "a bit flipped", cut: "cut in half", Path.unlink: "removed"}


@pytest.mark.parametrize("own", [True, False], ids=["own", "uri"])
@pytest.mark.parametrize("harm", HARM, ids=HARM.values())
def test_a_damaged_shard_is_named_before_any_step(base, values, whole, tmp_path, fault, harm, own):
    folder = shutil.copytree(whole, tmp_path / "scores")
    read(values, base, folder, own)
    harm(folder / "part-00001.safetensors")
    with pytest.raises(
        RunError if own else InputError, match=r"scores: part-00001\.safetensors is not as it was written; "
    ) as told:
        read(values, base, folder, own)
    assert folder.exists() is not own  # so that the next run makes its own again; others' are others'
    fault(f"a score shard {HARM[harm]} ({'own' if own else 'of a uri'})", "named before use, own made again", told.value)


def test_damaged_scores_of_an_earlier_run_do_not_come_from_the_cache(whole, tmp_path, capsys, fault):
    """As they lie below a local run's folder: without them KFP's cache makes them again."""
    kept, damaged = (
        shutil.copytree(whole, tmp_path / "tiny-2026-11-27-19-34-07-008998" / task / "scores") for task in ("score-1", "score-2")
    )
    flip(damaged / "part-00001.safetensors")
    _forget_damaged(tmp_path)
    assert kept.exists() and not damaged.exists()
    fault("cached scores have a bit flipped", "found before they are used, made again", capsys.readouterr().err)


@pytest.mark.parametrize("harm", HARM, ids=HARM.values())
def test_an_interrupted_scoring_makes_damaged_parts_again(base, values, whole, tmp_path, monkeypatch, fault, harm):
    monkeypatch.setattr(scoring, "PART_ROWS", 3)
    folder = shutil.copytree(whole, tmp_path / "scores")
    harm(folder / "part-00001.safetensors")
    assert 0 < score(values, base, folder) < score(values, base, tmp_path / "anew")
    read(values, base, folder)
    assert score(values, base, folder) == 0
    fault(f"a part of an interrupted scoring: {HARM[harm]}", "that part is made again", "1 part made again")


def rewritten(path: Path, header: dict[str, str] | None = None, **tensors: torch.Tensor) -> None:
    """A part with some of it replaced, sealed as if nothing had happened: by whoever can write there."""
    with safe_open(path, "pt") as file:
        told = file.metadata() | (header or {})
        held = {name: file.get_tensor(name).clone() for name in set(file.keys())} | tensors
    path.unlink()
    save_file({name: tensor for name, tensor in held.items() if tensor.numel()}, path, told)
    note(path)


def settings(folder: Path, **changes: Any) -> dict[str, str]:
    with safe_open(folder / "part-00001.safetensors", "pt") as file:
        return {"settings": json.dumps(json.loads(file.metadata()["settings"]) | changes)}


def swap(folder: Path) -> None:
    one, two = folder / "part-00001.safetensors", folder / "part-00000.safetensors"
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)
    note(one)
    note(two)


def forget(folder: Path, name: str) -> None:
    (folder / name).unlink()
    told = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({each: of for each, of in told.items() if each != name}))


def last(folder: Path) -> str:
    return max(path.name for path in folder.glob("part-*"))


FORGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another k in the header": (
        lambda f: rewritten(f / "part-00001.safetensors", settings(f, top_k=9)),
        r"values has the shape \[\d+, 8\], and not \[\d+, 9\]",
    ),
    "another k in one part": (
        lambda f: rewritten(
            f / "part-00001.safetensors",
            settings(f, top_k=1),
            values=torch.zeros(rows(f), 1),
            indices=torch.zeros(rows(f), 1, dtype=torch.int32),
        ),
        "was scored with other settings than part-00000",
    ),
    "a k that is a text": (
        lambda f: rewritten(f / "part-00001.safetensors", settings(f, top_k="many")),
        "its settings cannot be read",
    ),
    "starts that go back": (
        lambda f: rewritten(f / "part-00001.safetensors", starts=torch.tensor([0, 9, 3, rows(f)])),
        "its starts are not where rows begin",
    ),
    "a tensor that is missing": (
        lambda f: rewritten(f / "part-00001.safetensors", rest=torch.zeros(0)),
        "its rest are missing",
    ),
    "two parts under each other's name": (swap, r"part-00000\.safetensors: begins with row 3, .* end at row 0"),
    "a part in the middle forgotten": (
        lambda f: forget(f, "part-00001.safetensors"),
        r"part-00002\.safetensors: begins with row 6, .* end at row 3",
    ),
    "the last part forgotten": (lambda f: forget(f, last(f)), r"holds \d+ of \d+ rows: a part is missing"),
}


def rows(folder: Path) -> int:
    with safe_open(folder / "part-00001.safetensors", "pt") as file:
        return int(file.get_tensor("starts")[-1])


@pytest.mark.parametrize("what", FORGED)
def test_scores_that_are_not_what_they_claim(base, values, whole, tmp_path, fault, what):
    forge, message = FORGED[what]
    folder = shutil.copytree(whole, tmp_path / "scores")
    forge(folder)
    with pytest.raises(InputError, match=message) as told:
        read(values, base, folder, own=False)
    fault(f"scores: {what}", "one line", told.value)


def test_a_class_that_there_is_not(base, values, whole, tmp_path, fault):
    folder = shutil.copytree(whole, tmp_path / "scores")
    with safe_open(folder / "part-00000.safetensors", "pt") as file:
        indices = file.get_tensor("indices").clone()
    indices[0, 0] = 2**30
    rewritten(folder / "part-00000.safetensors", indices=indices)
    (teacher,) = read(values, base, folder, own=False)
    with pytest.raises(InputError, match=f"^{folder}: a score is of a class that is none of ") as told:
        teacher([{"shard": 0, "row": 0, teacher.column: [0] * rows(folder)}])
    fault("scores of the class 2^30", "one line", told.value)


@pytest.fixture(scope="module")
def shards(base, values):
    """A spec of three shards, their rows, and the scores of each."""
    spec = changed(values, data={"shards": 3})
    for number in range(3):
        prepare_rows(DistillationSpec.model_validate(spec), base / f"rows-{number}" / "train", "train", number)
        score_teacher(DistillationSpec.model_validate(spec), "other", base / f"rows-{number}", base / f"scores-{number}")
    return spec


@pytest.mark.parametrize("data", [{}, {"packing": True}], ids=["streamed", "fetched first"])
def test_shards_in_another_order(base, shards, fault, data):
    """Rows of one length would fit the scores of any other: what a teacher says of another text."""
    spec = DistillationSpec.model_validate(changed(shards, data=data))
    folders = [base / f"rows-{number}" for number in range(3)]

    def rows_with(*order: int) -> list[Any]:
        inputs = TrainingInputs(tuple(folders), {}, {}, {"other": tuple(base / f"scores-{number}" for number in order)})
        found = rows_of_shards(spec.data, list(map(str, folders)), rows_check(spec, scored_teachers(spec, inputs)))
        return [found[index] for index in range(len(found))]

    assert rows_with(0, 1, 2)
    with pytest.raises(InputError, match=r"^teachers\.0 \(other\): scores: .*/scores-2: made of other rows than these$") as told:
        rows_with(0, 2, 1)
    fault("score shards in another order", "named when the rows are read", told.value)


def test_shards_of_different_settings(base, shards, tmp_path, fault):
    spec = DistillationSpec.model_validate(shards)
    score(shards | {"data": shards["data"] | {"shards": 1}}, base, tmp_path / "odd", top_k=3)
    places = (base / "scores-0", tmp_path / "odd", base / "scores-2")
    inputs = TrainingInputs(tuple(base / f"rows-{number}" for number in range(3)), {}, {}, {"other": places})
    with pytest.raises(InputError, match=r"^teachers\.0 \(other\): scores: .*/odd: was scored with other settings than ") as told:
        scored_teachers(spec, inputs)
    fault("one shard of scores was made with another top_k", "named before any step", told.value)
