"""What a run says it ran on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import torch

from xtoken_core.compilations import keep_compilations
from xtoken_core.training import environment


def test_describes_this_process():
    described = environment.describe_environment()
    assert described.versions["torch"] == torch.__version__ and described.cpu_cores >= 1
    assert 0.1 < described.memory_gib < 1e5 and len(described.devices) == torch.cuda.device_count()


def test_compilations_are_kept_beside_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    keep_compilations()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"


def test_commit_is_of_the_checkout_that_holds_the_code(tmp_path, monkeypatch):
    """Not of some other checkout around an installed copy (a virtual environment inside a user's repository)."""
    monkeypatch.setenv("XTOKEN_COMMIT", "of-the-image")

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        ).stdout

    copy = tmp_path / "venv" / "environment.py"
    copy.parent.mkdir()
    shutil.copy(Path(environment.__file__), copy)
    spec = importlib.util.spec_from_file_location("installed_environment", copy)
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "other code")
    assert installed.commit() == "of-the-image"
    git("add", "venv")
    git("commit", "-q", "-m", "with the code")
    assert installed.commit() == git("rev-parse", "--short", "HEAD").strip()
    copy.write_text(copy.read_text() + "\n")
    assert installed.commit().endswith("+")
