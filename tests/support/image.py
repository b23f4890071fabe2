"""Images built by buildah, without a daemon and without a registry: on a base that is made of Debian's packages."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PYTHON = "ca-certificates,python3,python3-pip,python3-venv"


@dataclass(frozen=True)
class Images:
    """A store of images in a folder of its own."""

    folder: Path

    def buildah(self, *arguments: object, log: Path | None = None) -> str:
        """What a buildah command prints, or writes to `log`. Raises AssertionError where it fails."""
        places = ("--root", self.folder / "storage", "--runroot", self.folder / "run")
        command = ["buildah", *map(str, places), *map(str, arguments)]
        isolated = os.environ | {"BUILDAH_ISOLATION": "chroot"}
        with (log or Path(os.devnull)).open("w") as file:
            told = file if log else subprocess.PIPE
            done = subprocess.run(command, stdout=told, stderr=subprocess.STDOUT if log else None, text=True, env=isolated)
        assert done.returncode == 0, f"{' '.join(command[:8])}: {log or done.stdout}"
        return (done.stdout or "").strip()

    def base(self, name: str) -> None:
        """Makes an image that stands for python:*-slim: Debian's smallest system with its Python, which pip may install into."""
        root = self.folder / "debian"
        bootstrap = [
            "debootstrap",
            "--variant=minbase",
            f"--include={PYTHON}",
            platform.freedesktop_os_release()["VERSION_CODENAME"],
        ]
        subprocess.run([*bootstrap, str(root)], check=True, capture_output=True)
        container = self.buildah("from", "scratch")
        self.buildah("add", container, root, "/")
        as_slim = "ln -s python3 /usr/bin/python && rm -f /usr/lib/python3*/EXTERNALLY-MANAGED"
        self.buildah("run", container, "--", "sh", "-c", as_slim)
        self.buildah("commit", "--quiet", "--rm", container, name)
        shutil.rmtree(root)

    def size(self, name: str) -> str:
        """An image's size, for people."""
        return self.buildah("images", "--format", "{{.Size}}", name)


def pip_of_this_machine(folder: Path) -> list[str]:
    """Options that let a build find packages as pip does here: its settings, and the folders that they name, all read-only."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    found = [line.partition("=") for line in told.splitlines()]
    settings = {name.rpartition(".")[2]: ast.literal_eval(value) for name, _, value in found}
    config = folder / "pip.conf"
    config.write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in settings.items()), ""]))
    places = {place for value in settings.values() for word in value.split() if (place := _place(word))}
    mounts = [f"{config}:/etc/pip.conf:ro", *(f"{place}:{place}:ro" for place in sorted(places))]
    return mounted(mounts)


def _place(word: str) -> Path | None:
    """The folder that must be there for a path, or for an index at a file URL, whose packages lie beside its pages."""
    path = Path(word.removeprefix("file://"))
    if not path.is_absolute() or not path.exists():
        return None
    return path if path.is_dir() and not word.startswith("file://") else path.parent


def mounted(mounts: Sequence[str]) -> list[str]:
    """buildah's options for volumes."""
    return [word for mount in mounts for word in ("--volume", mount)]
