"""What lies on a shared machine: temporary folders, shared memory and downloads are this user's own, and are collected."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from pathlib import Path

import pytest

from tests.support.report_sample import sample_run
from tests.support.tiny import tiny_model
from tests.teachers.test_teachers import micro_batches, setup
from xtoken_core import storage
from xtoken_core.errors import InputError
from xtoken_core.report.answer import markdown
from xtoken_core.report.card import model_card
from xtoken_core.report.page import render_report
from xtoken_core.report.run import Run
from xtoken_core.storage import claims
from xtoken_core.teachers.pool import TeacherPool


def mode(path: Path | str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def test_shared_memory_has_no_name_and_no_other_user(tmp_path, fault):
    """Anonymous files, which only this user's processes can open through /proc."""
    with TeacherPool([setup(tiny_model(tmp_path, 400))]) as pool:
        pool.run([micro_batches((1, 4))])
        teacher = Path(f"/proc/{pool.teachers[0]._process.pid}")
        links = {os.readlink(path) for path in (teacher / "fd").iterdir()}
        assert any("memfd:xtoken" in link for link in links)
        assert mode(teacher / "fd") & 0o077 == 0
        held = [*links, *(teacher / "maps").read_text().splitlines()]
        assert [place for place in held if "/dev/shm/" in place and "/dev/shm/sem." not in place] == []
    fault("who may open what a teacher hands over", "this user only; it has no name", "memfd, 0500")


def test_claims_and_downloads_are_private(tmp_path, monkeypatch, fault):
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    old = os.umask(0)
    try:
        with storage.claimed(str(tmp_path / "run"), "works"):
            assert mode(tmp_path / ".run.claim") == 0o600
        (tmp_path / "in").write_text("text")
        storage.publish(tmp_path / "in", "memory://private/in")
        storage.local_copy("memory://private/in")
        assert mode(tmp_path / "cache") == 0o700
        assert mode(tempfile.mkdtemp(dir=tmp_path)) == 0o700
    finally:
        os.umask(old)
    fault("a umask of 0: claims, the folder of downloads, temporary folders", "0600, 0700, 0700", "as promised")


def test_a_claim_does_not_follow_a_planted_link(tmp_path, fault):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".run.claim").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError) as told, storage.claimed(str(tmp_path / "run"), "works"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"
    fault("a link is planted where a claim will lie", "not followed, one line", told.value)
    assert claims.PATIENCE > 2 * claims.REFRESH


PAYLOAD = "\"'`|</script></textarea><img src=x onerror=alert(1)>"

NAMES = [
    ("name",), ("spec", "name"), ("spec", "student", "model"), ("spec", "teachers", 0, "model"), ("spec", "output", "uri"),
    ("inputs", 0, "uri"), ("inputs", 0, "version"), ("inputs", 0, "licence"), ("inputs", 0, "field"), ("tasks", 0, "name"),
    ("spec", "data", "train", 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Run:
    """A run in which every name that others choose is a script."""
    folder = tmp_path_factory.mktemp("hostile")
    run = sample_run(folder)
    run.save(folder / "run.json")
    told = json.loads((folder / "run.json").read_text())
    planted = 0
    for path in NAMES:
        inner = told
        try:
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = f"{inner[path[-1]]}{PAYLOAD}"
        except (KeyError, IndexError, TypeError):
            continue
        planted += 1
    for result in told["results"]:
        for sample in result.get("samples") or []:
            for key, value in sample.items():
                if isinstance(value, str):
                    sample[key] = value + PAYLOAD
    assert planted >= 6
    return Run.model_validate(told)  # `load` would refuse such names of a spec


def test_settings_with_such_a_name_are_refused(hostile, tmp_path):
    hostile.model_copy(update={"settings": hostile.settings | {"name": PAYLOAD}}).save(tmp_path / "run.json")
    with pytest.raises(InputError, match="settings: name: "):
        Run.load(tmp_path / "run.json")


@pytest.mark.parametrize(
    "page", [render_report, lambda run: model_card(run, "best"), markdown], ids=["report", "card", "markdown"]
)
def test_names_that_are_scripts_stay_names(hostile, page, fault, request):
    text = page(hostile)
    shown = re.sub(r"(?s)\A---.*?\n---|(`{3,}).*?\n?\1|`[^`\n]*`", "", text)  # front matter and code are shown as they are
    assert "onerror" in text and "<img" not in shown and "</textarea>" not in shown
    fault(f"scripts as names in the {request.node.callspec.id}", "shown as text", "no tag of theirs")
