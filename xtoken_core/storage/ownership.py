"""Whether a run may be published at a place: better known before the training than after it.

A published run carries a list of its files under its name. Only what such a list of the same name holds is replaced unasked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from xtoken_core.errors import InputError
from xtoken_core.storage.places import filesystem, reported
from xtoken_core.storage.reading import INCOMPLETE, size
from xtoken_core.uris import is_remote

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

RUN_FILE = "run.json"
"""The data that a published run's report was made from."""

MANIFEST = "published.json"
"""What a published run is known by: a `Manifest`."""

_MAX_MANIFEST = 16 * 2**20


class Manifest(BaseModel):
    """What a publication put at its place."""

    model_config = ConfigDict(extra="forbid", strict=True)

    project: Literal["xtoken-pipelines"]
    name: str
    """Of the run, or of the step and its output."""
    files: list[str]
    """Relative to the place, this list included."""

    @classmethod
    def of_folder(cls, folder: Path, name: str) -> Manifest:
        """Lists a folder as it will be published, links followed."""
        walk = os.walk(folder, followlinks=True)
        files = {Path(root, file).relative_to(folder).as_posix() for root, _, files in walk for file in files}
        return cls(project="xtoken-pipelines", name=name, files=sorted(files | {MANIFEST}))


ASK = "choose another place, or set output.replace: true"


def check_place(uri: str, name: str, replace: bool = False, ask: str = ASK) -> None:
    """Raises InputError, which ends with `ask`, unless a run or what a step writes may be published under this name at `uri`.

    It may where nothing is, and in place of an earlier publication of its name with no other files beside; with `replace` in place of
    any folder. It must be possible to write there, and to rename what lies there.
    """
    fs, target = filesystem(uri)
    if "/" not in target.strip("/") and (is_remote(uri) or not target):
        raise InputError(f"{uri}: is a whole bucket or file system, which nothing can take the place of; name a folder in it")
    with reported(uri):
        fs.invalidate_cache()
        if not is_remote(uri):
            _check_folder(uri, target)
        present = set(_all_files(fs, target))
        if present and not replace:
            _check_owner(uri, name, _manifest(fs, target), present, ask)
        probe = f"{os.path.dirname(target)}/.{os.path.basename(target)}.probe"
        fs.makedirs(os.path.dirname(target), exist_ok=True)
        fs.pipe_file(probe, b"probe")
        with contextlib.suppress(FileNotFoundError):  # another looks at the same place just now
            fs.rm_file(probe)


def check_space(uri: str, model: str) -> None:
    """Raises InputError where a local place has no room for two copies of a local or remote model: the best student and the last."""
    if is_remote(uri):
        return
    _, target = filesystem(uri)
    needed, free = 2 * size(model), shutil.disk_usage(_existing(target)).free
    if needed > free:
        raise InputError(f"{uri}: {free / 1e9:.1f} GB are free, and 2 copies of the student need {needed / 1e9:.1f} GB")


def _existing(path: str) -> str:
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _check_folder(uri: str, target: str) -> None:
    """Raises InputError for what a rename cannot replace by a folder, or would replace by something else than it is."""
    if os.path.islink(target):
        raise InputError(f"{uri}: is a symbolic link, which publishing would replace; name the folder that it leads to")
    if os.path.ismount(target):
        raise InputError(f"{uri}: is a mount point, which nothing can take the place of; name a folder in it")
    if os.path.exists(target) and not os.path.isdir(target):
        raise InputError(f"{uri}: is a file, and not a folder")


def _all_files(fs: AbstractFileSystem, target: str) -> list[str]:
    """Everything below a place but folders, hidden files and links included, relative to it."""
    if "file" in fs.protocol:
        return [
            os.path.relpath(os.path.join(root, name), target)
            for root, folders, files in os.walk(target)
            for name in (*files, *(f for f in folders if os.path.islink(os.path.join(root, f))))
        ]
    return [name[len(target) + 1 :] for name in fs.find(target)]


def _manifest(fs: AbstractFileSystem, target: str) -> Manifest | None:
    """Of a complete publication, or of one that was interrupted; None where there is none that can be read."""
    for name in (INCOMPLETE, MANIFEST):
        try:
            return Manifest.model_validate_json(fs.cat_file(f"{target}/{name}", end=_MAX_MANIFEST))
        except (FileNotFoundError, ValidationError):
            continue
    return None


def _check_owner(uri: str, name: str, manifest: Manifest | None, present: set[str], ask: str) -> None:
    if manifest is None:
        raise InputError(f"{uri}: holds other things (no {MANIFEST} of a run), which publishing would delete; {ask}")
    if manifest.name != name:
        raise InputError(f"{uri}: holds the run {manifest.name!r}, which publishing {name!r} would delete; {ask}")
    if foreign := sorted(present - set(manifest.files) - {INCOMPLETE}):
        raise InputError(
            f"{uri}: holds {foreign[0]!r}, which no run put there and publishing would delete; move it away, or {ask}"
        )
