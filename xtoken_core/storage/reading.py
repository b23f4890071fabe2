"""Reading: what a URI names, its fingerprint, a local copy of it, and removal."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from xtoken_core.errors import InputError
from xtoken_core.storage.places import filesystem, reported
from xtoken_core.storage.progress import progress
from xtoken_core.uris import is_remote

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

INCOMPLETE = "_INCOMPLETE"
"""Object that marks a folder of an object store as half-published: written before the first file, removed after the last."""

FILES_AT_ONCE = 8
"""Files of one transfer that are under way together, each in several parts."""

_CHUNK = 32 * 2**20


def expand(uris: Iterable[str]) -> list[str]:
    """The files that `uris` (files, folders, globs) name, each once, in a fixed order.

    What exists under its very name is that; `*`, `?` and `[` make a glob only of what does not. Folders are searched
    through, hidden files left out. Raises InputError for one that names nothing.
    """
    found: dict[str, None] = {}
    for uri in uris:
        fs, path = filesystem(uri)
        with reported(uri):
            fs.invalidate_cache()
            paths = sorted(_files_below(fs, path))
            if not is_remote(uri) and (linked := next(filter(os.path.isdir, paths), None)):
                raise InputError(f"{linked}: is a link to a folder, which is not followed")
        if not paths:
            raise InputError(f"{uri}: no such file, or nothing in it")
        found.update(dict.fromkeys(fs.unstrip_protocol(p) if is_remote(uri) else p for p in paths))
    return list(found)


def open_text(uri: str) -> IO[str]:
    """Opens a file as UTF-8 text. Raises InputError where it cannot be read (decoding errors come while reading)."""
    fs, path = filesystem(uri)
    with reported(uri):
        return fs.open(path, "r", encoding="utf-8")


def fingerprint(uri: str) -> str:
    """A short digest of a file, a folder's files or a glob's matches, that changes with any: sizes, ETags or modification times.

    Nothing is read. Raises InputError where there is nothing.
    """
    fs, path = filesystem(uri)
    with reported(uri):
        return _digest(path, _listing(fs, path, uri))


def size(uri: str) -> int:
    """Bytes of a file, or of a folder's visible files. Raises InputError where there is nothing."""
    fs, path = filesystem(uri)
    with reported(uri):
        return sum(info["size"] for info in _listing(fs, path, uri).values())


def local_copy(uri: str) -> Path:
    """A local path with the file or folder of `uri`: the thing itself if it is local, else a cached download.

    Downloads run in parallel ranges, appear in the cache whole or not at all, and are made again when the original
    changes. Raises InputError for what is missing, half-published, or cannot be reached.
    """
    fs, path = filesystem(uri)
    if not is_remote(uri):
        if not os.path.exists(path):
            raise InputError(f"{uri}: no such file or folder")
        with reported(uri):
            _check_kind([path, *(entry.path for entry in os.scandir(path))] if os.path.isdir(path) else [path])
        return Path(path)
    with reported(uri):
        listing = _listing(fs, path, uri)
        cache, digest = cache_folder(), _digest(path, listing)
        target = cache / digest / path.rsplit("/", 1)[-1]
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _lock(cache / f"{digest}.lock"):  # of the processes of a host, one downloads
            if not _is_whole(path, listing, target):
                shutil.rmtree(target.parent, ignore_errors=True)
                _sweep(cache)
                _fill(fs, path, listing, target, uri)
        return target


def cache_folder() -> Path:
    """Where downloads are kept: `$XTOKEN_CACHE`, else `xtoken` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xtoken"
    return Path(os.environ.get("XTOKEN_CACHE") or default)


def folders(uri: str) -> list[str]:
    """URIs of the complete folders directly in `uri`, sorted by name; none where `uri` does not exist."""
    fs, path = filesystem(uri)
    with reported(uri):
        fs.invalidate_cache()
        entries = fs.ls(path, detail=True) if fs.isdir(path) else []
        names = sorted(os.path.basename(e["name"].rstrip("/")) for e in entries if e["type"] == "directory")
        held = {name: _files_below(fs, f"{path}/{name}") for name in names if name[0] != "."}  # some stores keep empty folders
        return [
            f"{uri.rstrip('/')}/{name}" for name, files in held.items() if files and f"{path}/{name}/{INCOMPLETE}" not in files
        ]


def remove(uri: str) -> None:
    """Deletes a file or folder, if it is there."""
    fs, path = filesystem(uri)
    with reported(uri):
        remove_path(fs, path)


def remove_path(fs: AbstractFileSystem, path: str) -> None:
    """Deletes a file or folder of a file system, if it is there; unlike `fs.rm`, no part of its name is a pattern."""
    fs.invalidate_cache()
    with contextlib.suppress(FileNotFoundError):
        if "file" in fs.protocol:
            fs.rm(path, recursive=True)
        else:
            for name in fs.find(path):
                fs.rm_file(name)


def _files_below(fs: AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """fsspec's info, by path, of the file itself, of the visible files of a folder, or of what a glob matches."""
    local = "file" in fs.protocol
    if fs.isfile(path):
        return {path: fs.info(path)}
    if fs.isdir(path):
        files = fs.find(path, detail=True)
        seen = {f: i for f, i in files.items() if f != path and not any(part[:1] == "." for part in f[len(path) :].split("/"))}
        _check_kind(seen if local else ())
        return seen
    _check_kind([path] if local else ())
    if any(c in path for c in "*?["):
        return {f: info for f, info in fs.glob(_pattern(fs, path), detail=True).items() if info["type"] == "file"}
    return {}


def _check_kind(paths: Iterable[str]) -> None:
    """Raises InputError for a pipe, a socket or a device among local paths: reading it may never end."""
    for path in paths:
        with contextlib.suppress(OSError):  # a link to nothing, which whoever reads it tells
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise InputError(f"{path}: is a pipe, a socket or a device, and not a file")


def _pattern(fs: AbstractFileSystem, path: str) -> str:
    """The glob with folders that exist under their very names, such as `run [v2]`, escaped."""
    parts = path.split("/")
    for depth, part in enumerate(parts):
        if glob.escape(part) != part and fs.isdir("/".join(path.split("/")[: depth + 1])):
            parts[depth] = glob.escape(part)
    return "/".join(parts)


def _listing(fs: AbstractFileSystem, path: str, uri: str) -> dict[str, dict[str, Any]]:
    """fsspec's info of every visible file at `path`, by path. Raises InputError if there is none, or it is half-published."""
    fs.invalidate_cache()
    if is_remote(uri):
        for folder in _parents(path):
            if fs.exists(f"{folder}/{INCOMPLETE}"):
                raise InputError(f"{uri}: half-published (its publisher is at work, or died): {folder}/{INCOMPLETE} is there")
    infos = _files_below(fs, path)
    if not infos:
        raise InputError(f"{uri}: no such file or folder")
    return infos


def _parents(path: str) -> list[str]:
    """`b/x/y` -> `b/x/y`, `b/x`, `b`: the folders in which a marker would cover the path."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _digest(path: str, listing: dict[str, dict[str, Any]]) -> str:
    def version(info: dict[str, Any]) -> Any:
        return next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), None)

    lines = [f"{name[len(path) :]}\t{info['size']}\t{version(info)}" for name, info in sorted(listing.items())]
    return hashlib.sha256("\n".join([path, *lines]).encode()).hexdigest()[:20]


def _fill(fs: AbstractFileSystem, path: str, listing: dict[str, dict[str, Any]], target: Path, uri: str) -> None:
    """Downloads into a folder beside the target's, and renames it when it is whole."""
    staging = _staging(target.parent)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _download(fs, path, listing, staging / target.name, uri)
        if _digest(path, _listing(fs, path, uri)) != target.parent.name:
            raise InputError(f"{uri}: changed while it was read")
        staging.rename(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _places(path: str, listing: Iterable[str], target: Path) -> list[Path]:
    """Where each file of a listing lies in the copy at `target`."""
    return [target / name[len(path) + 1 :] if name != path else target for name in listing]


def _is_whole(path: str, listing: dict[str, dict[str, Any]], target: Path) -> bool:
    """Whether a copy is there with every byte: a power cut soon after it was made can leave empty files."""
    pairs = zip(_places(path, listing, target), listing.values(), strict=True)
    return all(place.is_file() and info["size"] in (None, place.stat().st_size) for place, info in pairs)


def _staging(final: Path) -> Path:
    return final.with_name(f"{final.name}.partial")


def _sweep(cache: Path) -> None:
    """Deletes what interrupted downloads left: the parts whose lock nobody holds."""
    for staging in cache.glob("*.partial"):
        with contextlib.suppress(BlockingIOError), _lock(staging.with_suffix(".lock"), wait=False):
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds a file's lock. Raises BlockingIOError where another process holds it and `wait` is false."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would leave it with a process that was forked meanwhile


def _download(fs: AbstractFileSystem, path: str, listing: dict[str, dict[str, Any]], target: Path, uri: str) -> None:
    """Fetches every file of `listing` into `target`, several at a time and large ones by ranges."""
    places = _places(path, listing, target)
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
    names, local = list(listing), [str(place) for place in places]
    with progress("reading", uri, sum(info["size"] for info in listing.values())) as callback:
        if "s3" not in fs.protocol:
            return fs.get(names, local, callback=callback)
        from s3fs.core import S3_RETRYABLE_ERRORS

        try:
            fs.get(names, local, callback=callback, batch_size=FILES_AT_ONCE, chunksize=_CHUNK)
        except S3_RETRYABLE_ERRORS:  # an answer that broke off: a single stream of s3fs goes on where it stopped
            fs.get(names, local, callback=callback, batch_size=FILES_AT_ONCE, max_concurrency=1)
