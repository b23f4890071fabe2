"""An object store that fails in the middle of things: what it does once is tried again, what it does for ever is one line."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path

import pytest

from tests.support.faulty_store import FAULTS, FaultyStore, faulty
from tests.support.training_run import FIVE_STEPS, losses, prepare, run
from xtoken_core import storage
from xtoken_core.errors import InputError
from xtoken_core.storage import claims, publishing
from xtoken_core.training.checkpoints import latest_checkpoint

MIB = 2**20
FOR_EVER = math.inf

PUBLISHING = {
    "the claim": lambda method, path: method == "PUT" and ".claim" in path,
    "a part of an upload": lambda method, path: method == "PUT" and "partNumber" in path,
    "an upload": lambda method, path: method == "PUT" and ".partial/config.json" in path,
    "the end of an upload": lambda method, path: method == "POST" and "uploadId" in path,
    "a copy within the store": lambda method, path: method == "PUT" and path.endswith("/place/config.json"),
    "the marker": lambda method, path: method == "PUT" and "_INCOMPLETE" in path,
    "a listing": lambda method, path: method == "GET" and "list-type" in path,
    "a deletion": lambda method, path: method == "DELETE" and ".partial" in path,
}
READING = {
    "a download": lambda method, path: method == "GET" and path.endswith("/weights"),
    "a listing": PUBLISHING["a listing"],
}


@pytest.fixture
def store(weed, tmp_path, monkeypatch):
    """A store with faults, and a file system that goes past them; in the folder `root` of its bucket."""
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(claims, "REFRESH", 0.2)
    monkeypatch.setattr(publishing, "_PART", 5 * MIB)
    with faulty(weed, monkeypatch, "faults") as both:
        yield both


@pytest.fixture
def place(tmp_path) -> str:
    return f"s3://faults/{tmp_path.name}/place"


def model(folder: Path, text: str, parts: bool = False) -> Path:
    """A folder to publish; `parts`: with a file that is stored in parts."""
    folder.mkdir()
    (folder / "weights").write_bytes(os.urandom(11 * MIB if parts else 1000))
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def same(copy: Path, source: Path) -> bool:
    return all((copy / name).read_bytes() == (source / name).read_bytes() for name in ("weights", "config.json"))


def beside(fs, place: str) -> list[str]:
    """What a publication has left beside its place: files, hidden ones too, and parts of files."""
    fs.invalidate_cache()
    root = place.removeprefix("s3://").rpartition("/")[0]
    parts = [upload["Key"] for upload in fs.list_multipart_uploads("faults")]
    return [path for path in fs.find(root) if not path.startswith(f"{root}/place/")] + parts


@pytest.mark.parametrize("kind", FAULTS)
def test_what_fails_once_in_a_publication_is_tried_again(store, place, tmp_path, fault, kind):
    faults, past = store
    for number, (step, rule) in enumerate(PUBLISHING.items()):
        if step != "a part of an upload" and number % len(FAULTS) != FAULTS.index(kind):
            continue
        source = model(tmp_path / str(number), step, parts="upload" in step and step != "an upload")
        faults.fail(rule, kind, 1)
        storage.publish(source, place)
        assert faults.failed == 1, step
        assert same(storage.local_copy(place), source) and beside(past, place) == []
        fault(f"publishing: {step} fails once ({kind})", "tried again, whole", "published")


@pytest.mark.parametrize("step", ["the claim", "a part of an upload", "an upload", "the end of an upload", "the marker"])
def test_a_publication_that_fails_for_good_is_one_line_and_leaves_what_was_there(
    store, place, tmp_path, monkeypatch, fault, step
):
    faults, past = store
    monkeypatch.setattr(claims, "PATIENCE", 1.0)
    old = model(tmp_path / "old", "old")
    storage.publish(old, place)
    faults.fail(PUBLISHING[step], "503", FOR_EVER)
    with pytest.raises(InputError, match=f"^{place}: .*ServiceUnavailable") as told:
        storage.publish(model(tmp_path / "new", "new", parts="upload" in step), place)
    assert "\n" not in str(told.value) and beside(past, place) == []
    faults.times = 0
    assert same(storage.local_copy(place), old)
    fault(f"publishing: {step} fails for ever", "one line, the old one stays, nothing is left", told.value)


def test_what_can_be_half_published_is_marked_and_replaced_by_the_next(store, place, tmp_path, fault):
    """A store without renames that fails after the old files have gone: no reader takes what is there."""
    faults, past = store
    new = model(tmp_path / "new", "new")
    storage.publish(model(tmp_path / "old", "old"), place)
    faults.fail(PUBLISHING["a copy within the store"], "503", FOR_EVER)
    with pytest.raises(InputError, match=f"^{place}: "):
        storage.publish(new, place)
    faults.times = 0
    with pytest.raises(InputError, match=f"^{place}: half-published") as told:
        storage.local_copy(place)
    storage.publish(new, place)
    assert same(storage.local_copy(place), new) and beside(past, place) == []
    fault("publishing: the copies within the store fail for ever", "marked, refused by readers, replaced by the next", told.value)


@pytest.mark.parametrize("step", READING)
def test_downloads_are_tried_again_and_else_leave_nothing(store, place, tmp_path, fault, step):
    faults, _ = store
    source = model(tmp_path / "model", "one")
    storage.publish(source, place)
    faults.fail(READING[step], "503", FOR_EVER)
    with pytest.raises(InputError, match=f"^{place}: ") as told:
        storage.local_copy(place)
    assert "\n" not in str(told.value)
    assert [path for path in (tmp_path / "cache").glob("*") if path.suffix != ".lock"] == []
    fault(f"reading: {step} fails for ever", "one line, nothing is left", told.value)
    for kind in FAULTS:
        faults.fail(READING[step], kind, 1)
        copy = storage.local_copy(place)
        assert faults.failed == 1 and same(copy, source)
        storage.remove(str(copy.parent))
        fault(f"reading: {step} fails once ({kind})", "tried again, whole", "read")


def test_a_store_that_does_not_answer_is_told_of(store, place, tmp_path, caplog, monkeypatch, fault):
    """While requests are tried again, which may take many minutes; one line for all that are under way."""
    faults, _ = store
    storage.publish(model(tmp_path / "model", "one"), place)
    faults.fail(lambda method, path: True, "dropped", 3)
    with caplog.at_level(logging.WARNING, "xtoken_core"):
        storage.local_copy(place)
    (told,) = (line for line in caplog.messages if "no answer" in line)
    assert told.startswith(f"{faults.endpoint}: no answer at attempt 1: ")
    fault("a store does not answer", "said while it is asked again", told)


def test_a_store_that_is_gone_for_a_while_ends_no_training(store, tmp_path, monkeypatch, caplog, fault):
    """The checkpoint of the first save is not kept there, the next one is."""
    faults, past = store
    monkeypatch.setattr(claims, "PATIENCE", 1.0)
    uri = f"s3://faults/{tmp_path.name}/kept"
    values = prepare(tmp_path, teachers=1, training=FIVE_STEPS)
    saves = _Saves(faults)
    faults.fail(saves, "503", FOR_EVER)
    with caplog.at_level(logging.WARNING, "xtoken_core"):
        run(values, tmp_path, tmp_path / "out", checkpoint_uri=uri)
    (told,) = (line for line in caplog.messages if "not kept" in line)
    assert told.startswith("checkpoint-2 is not kept in the store (") and "ServiceUnavailable" in told
    faults.times = 0
    assert latest_checkpoint(tmp_path / "none", uri).name == "checkpoint-5" and len(losses(tmp_path / "out")) == 5
    assert [path for path in past.find(f"faults/{tmp_path.name}") if ".partial" in path or ".claim" in path] == []
    fault("the store fails while a checkpoint is kept", "said, the training goes on, the next one is kept", told)


class _Saves:
    """Fails whatever is written of the first checkpoint."""

    def __init__(self, store: FaultyStore):
        self.store = store

    def __call__(self, method: str, path: str) -> bool:
        return method in ("PUT", "POST") and "checkpoint-2" in path
