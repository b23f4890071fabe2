"""Publishing: a local folder appears somewhere whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from xtoken_core.storage.claims import claimed
from xtoken_core.storage.ownership import MANIFEST, Manifest
from xtoken_core.storage.places import filesystem, reported
from xtoken_core.storage.progress import progress
from xtoken_core.storage.reading import FILES_AT_ONCE, INCOMPLETE, remove_path
from xtoken_core.uris import is_remote

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_PART = 16 * 2**20


def publish(folder: str | Path, uri: str, allowed: Callable[[], None] = lambda: None) -> None:
    """Copies a local folder to `uri`, where it appears whole or not at all; what was there before is replaced.

    Locally: a copy beside the target, then a rename. On an object store, which has no renames: an upload beside the target
    (multipart, several files at a time, retried), then a copy within the store under an `_INCOMPLETE` marker, which every
    reader of this project heeds. For other readers: what was there goes before anything new comes, config.json goes first
    and comes last, so that in between there is no model to load, and files of two publications never lie side by side.
    (One who reads a file before that and the next one after it gets both; no store can prevent it under one name.)
    What an interrupted publication left beside `uri` is removed by the next one.
    Raises InputError (no space left, not allowed, not reachable, another is at it) with nothing left behind. A single file is
    taken as well. `allowed` raises it where the place must stay as it is; it is called when no other can publish there any more.
    """
    fs, target = filesystem(uri)
    if Path(folder).is_file() and is_remote(uri):  # an object is there whole or not at all
        with reported(uri):
            return fs.put_file(str(folder), target)
    walk = os.walk(folder, followlinks=True)  # links, so that a caller can put a folder together without copying it
    files = {
        Path(root, name).relative_to(folder).as_posix(): os.path.getsize(os.path.join(root, name))
        for root, _, names in walk
        for name in names
    }
    staging = f"{os.path.dirname(target)}/.{os.path.basename(target)}.partial"
    with claimed(uri, "publishes") as still_ours, reported(uri):
        allowed()
        try:
            _clear(fs, staging, target)
            _upload(fs, Path(folder), files, staging, uri)
            still_ours()
            (_commit_by_copy if is_remote(uri) else _commit_by_rename)(fs, staging, target, files)
        finally:
            with contextlib.suppress(Exception):
                _clear(fs, staging, target)


def clear_leftovers(uri: str) -> None:
    """Removes what interrupted publications of folders directly in `uri` have left; nothing may be published there meanwhile."""
    fs, path = filesystem(uri)
    with reported(uri):
        fs.invalidate_cache()
        names = {os.path.basename(name.rstrip("/")) for name in (fs.ls(path, detail=False) if fs.isdir(path) else [])}
        for name in sorted(names):
            if found := re.fullmatch(r"\.(.+)\.partial(\.old)?", name):
                _clear(fs, f"{path}/.{found[1]}.partial", f"{path}/{found[1]}")
            elif is_remote(uri) and fs.exists(f"{path}/{name}/{INCOMPLETE}"):
                remove_path(fs, f"{path}/{name}")
        _abort_uploads(fs, path)


def _clear(fs: AbstractFileSystem, staging: str, target: str) -> None:
    """Removes what a publication has beside its target, and puts back what one that died had set aside."""
    if "file" in fs.protocol:
        old = _old(staging)
        if os.path.lexists(old) and not os.path.lexists(target):
            os.rename(old, target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(staging, ignore_errors=True)
        return
    remove_path(fs, staging)
    _abort_uploads(fs, staging)


def _abort_uploads(fs: AbstractFileSystem, folder: str) -> None:
    """Removes the parts of files in a folder of S3 that never became one: they are in no listing, and are paid for."""
    if "s3" in fs.protocol:
        bucket, key, _ = fs.split_path(folder)
        with contextlib.suppress(OSError):  # a right of its own, without which publishing works all the same
            for upload in fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/").get("Uploads", []):
                fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])


def _old(staging: str) -> str:
    return f"{staging}.old"


def _upload(fs: AbstractFileSystem, folder: Path, files: Mapping[str, int], staging: str, uri: str) -> None:
    for parent in sorted({os.path.dirname(f"{staging}/{name}") for name in files}):
        fs.makedirs(parent, exist_ok=True)
    options = {"chunksize": _PART, "batch_size": FILES_AT_ONCE} if "s3" in fs.protocol else {}
    with progress("publishing", uri, sum(files.values())) as callback:
        fs.put([str(folder / name) for name in files], [f"{staging}/{name}" for name in files], callback=callback, **options)


def _commit_by_rename(fs: AbstractFileSystem, staging: str, target: str, files: Iterable[str]) -> None:
    if os.path.lexists(target):
        os.rename(target, _old(staging))
    os.rename(staging, target)


def _commit_by_copy(fs: AbstractFileSystem, staging: str, target: str, files: Iterable[str]) -> None:
    fs.invalidate_cache()
    marker = f"{target}/{INCOMPLETE}"
    earlier = [name[len(target) + 1 :] for name in fs.find(target) if name != marker] if fs.exists(target) else []
    fs.pipe_file(marker, _interrupted(fs, staging, [*earlier, *files]))
    for name in sorted(earlier, key=_rank, reverse=True):
        fs.rm_file(f"{target}/{name}")
    _by_rank(files, lambda names: fs.copy([f"{staging}/{n}" for n in names], [f"{target}/{n}" for n in names]))
    fs.rm_file(marker)


def _interrupted(fs: AbstractFileSystem, staging: str, files: list[str]) -> bytes:
    """What the marker says: whose files may lie there if this publication does not end. Nothing, where they are not a run's."""
    try:
        manifest = Manifest.model_validate_json(fs.cat_file(f"{staging}/{MANIFEST}"))
    except (FileNotFoundError, ValidationError):
        return b""
    return manifest.model_copy(update={"files": sorted({*files, *manifest.files})}).model_dump_json().encode()


def _by_rank(names: Iterable[str], action: Callable[[list[str]], None]) -> None:
    """Runs `action` on the names of one rank after those of the rank before."""
    for _, group in groupby(sorted(names, key=_rank), _rank):
        action(list(group))


def _rank(name: str) -> int:
    """2 for a model's config.json, without which nothing loads it; 1 for the indices through which files are found; 0 for the rest."""
    return 2 if os.path.basename(name) == "config.json" else 1 if name.endswith(".json") else 0
