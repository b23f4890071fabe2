"""Files wherever they lie: local paths and fsspec URIs (`s3://`, `file://`, `memory://`, ...), read once and published whole.

Endpoint and credentials come from the environment as AWS tools take them (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).
Relative paths are relative to the working directory. Everything a user can get wrong raises `InputError`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from xtoken_core.errors import InputError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

INCOMPLETE = "_INCOMPLETE"
"""Object that marks a folder of an object store as half-published: written before the first file, removed after the last."""

RUN_FILE = "run.json"
"""What a published run is known by: the data that its report was made from."""

RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between attempts of one transfer, on top of the retries that botocore makes by itself."""

PROGRESS_DELAY = 1.0
"""Seconds that a transfer must take before its progress is shown."""

_CHUNK = 32 * 2**20
_THREADS = 8
_MULTIPART_CHUNK = 16 * 2**20


def is_remote(uri: str) -> bool:
    """Whether `uri` names something that is not on the local file system."""
    return "://" in uri and not uri.startswith("file://")


def normalize(uri: str) -> str:
    """`file:///x` as `/x`, and KFP's own `minio://bucket/x` as `s3://bucket/x`; others as they are."""
    return uri.removeprefix("file://") if uri.startswith("file://") else uri.replace("minio://", "s3://", 1)


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of `uri` and the path on it. Raises InputError for an unknown protocol."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(normalize(uri))
    except (ImportError, ValueError) as e:
        raise InputError(f"{uri}: {str(e).splitlines()[0]}") from None
    return fs, path.rstrip("/")


# ------------------------------------------------------------------------------------------------------------ reading


def expand(uris: Iterable[str]) -> list[str]:
    """The files that `uris` (files, folders, globs) name, each once, in a fixed order.

    Folders are searched through, hidden files left out. Raises InputError for one that names nothing.
    """
    found: dict[str, None] = {}
    for uri in uris:
        fs, path = filesystem(uri)
        with _reported(uri):
            fs.invalidate_cache()
            paths = _retried(partial(_files_below, fs, path), uri)
        if not paths:
            raise InputError(f"{uri}: no such file, or nothing in it")
        found.update(dict.fromkeys(fs.unstrip_protocol(p) if is_remote(uri) else p for p in paths))
    return list(found)


def open_text(uri: str) -> IO[str]:
    """Opens a file as UTF-8 text. Raises InputError where it cannot be read (decoding errors come while reading)."""
    fs, path = filesystem(uri)
    with _reported(uri):
        return fs.open(path, "r", encoding="utf-8")


def fingerprint(uri: str) -> str:
    """A short digest of a file, a folder's files or a glob's matches, that changes with any: sizes, ETags or modification times.

    Nothing is read. Raises InputError where there is nothing.
    """
    fs, path = filesystem(uri)
    with _reported(uri):
        return _digest(path, _retried(lambda: _listing(fs, path, uri), uri))


def local_copy(uri: str) -> Path:
    """A local path with the file or folder of `uri`: the thing itself if it is local, else a cached download.

    Downloads run in parallel ranges, are retried, appear in the cache whole or not at all, and are made again when the
    original changes. Raises InputError for what is missing, half-published, or cannot be reached.
    """
    fs, path = filesystem(uri)
    if not is_remote(uri):
        if not os.path.exists(path):
            raise InputError(f"{uri}: no such file or folder")
        return Path(path)
    with _reported(uri):
        listing = _retried(lambda: _listing(fs, path, uri), uri)
        target = cache_folder() / _digest(path, listing) / path.rsplit("/", 1)[-1]
        cache_folder().mkdir(parents=True, exist_ok=True)
        with _lock(target.parent.with_suffix(".lock")):  # of the processes of a host, one downloads
            if not target.exists():
                _fill(fs, path, listing, target, uri)
        return target


def _fill(fs: AbstractFileSystem, path: str, listing: dict[str, dict[str, Any]], target: Path, uri: str) -> None:
    """Downloads into a folder beside the target's, and renames it when it is whole."""
    staging = target.parent.with_name(f"{target.parent.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        _download(fs, path, listing, staging / target.name, uri)
        if _digest(path, _listing(fs, path, uri)) != target.parent.name:
            raise InputError(f"{uri}: changed while it was read")
        staging.rename(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """Where downloads are kept: `$XTOKEN_CACHE`, else `xtoken` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xtoken"
    return Path(os.environ.get("XTOKEN_CACHE") or default)


def folders(uri: str) -> list[str]:
    """URIs of the complete folders directly in `uri`, sorted by name; none where `uri` does not exist."""
    fs, path = filesystem(uri)
    with _reported(uri):
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
    with _reported(uri), contextlib.suppress(FileNotFoundError):
        fs.invalidate_cache()
        fs.rm(path, recursive=True)


def _files_below(fs: AbstractFileSystem, path: str) -> list[str]:
    """The file itself, the visible files of a folder, or what a glob matches, sorted."""
    if any(c in path for c in "*?["):
        return sorted(p for p in fs.glob(path) if fs.isfile(p))
    if fs.isfile(path):
        return [path]
    files = sorted(fs.find(path)) if fs.isdir(path) else []
    return [f for f in files if f != path and not any(part.startswith(".") for part in f[len(path) :].split("/"))]


def _listing(fs: AbstractFileSystem, path: str, uri: str) -> dict[str, dict[str, Any]]:
    """fsspec's info of every visible file at `path`, by path. Raises InputError if there is none, or it is half-published."""
    fs.invalidate_cache()
    if is_remote(uri):
        for folder in _parents(path):
            if fs.exists(f"{folder}/{INCOMPLETE}"):
                raise InputError(f"{uri}: half-published (its publisher is at work, or died): {folder}/{INCOMPLETE} is there")
    infos = {f: fs.info(f) for f in _files_below(fs, path)}
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


def _download(fs: AbstractFileSystem, path: str, listing: dict[str, dict[str, Any]], target: Path, uri: str) -> None:
    """Fetches every file of `listing` into `target` by ranges, several at a time."""
    ranges = []
    for name, info in listing.items():
        local = target / name[len(path) + 1 :] if name != path else target
        local.parent.mkdir(parents=True, exist_ok=True)
        with local.open("wb") as file:
            file.truncate(info["size"])
        ranges += [(name, local, start, min(start + _CHUNK, info["size"])) for start in range(0, info["size"], _CHUNK)]

    def fetch(name: str, local: Path, start: int, end: int) -> int:
        data = _retried(lambda: fs.cat_file(name, start=start, end=end), uri)
        if len(data) != end - start:
            raise InputError(f"{uri}: changed while it was read: {name}")
        with local.open("r+b") as file:
            file.seek(start)
            file.write(data)
        return len(data)

    _transfer("reading", uri, fetch, ranges, sum(info["size"] for info in listing.values()))


# --------------------------------------------------------------------------------------------------------- publishing


def publish(folder: str | Path, uri: str) -> None:
    """Copies a local folder to `uri`, where it appears whole or not at all; what was there before is replaced.

    Locally: a copy beside the target, then a rename. On an object store, which has no renames: an upload beside the target
    (multipart, several files at a time, retried), then a copy within the store under an `_INCOMPLETE` marker, which every
    reader of this project heeds. For other readers: what was there goes before anything new comes, config.json goes first
    and comes last, so that in between there is no model to load, and files of two publications never lie side by side.
    (One who reads a file before that and the next one after it gets both; no store can prevent it under one name.)
    Raises InputError (no space left, not allowed, not reachable) with nothing left behind. A single file is taken as well.
    """
    fs, target = filesystem(uri)
    if Path(folder).is_file() and is_remote(uri):  # an object is there whole or not at all
        with _reported(uri):
            return _retried(partial(fs.put_file, str(folder), target), uri)
    staging = f"{os.path.dirname(target)}/.{os.path.basename(target)}.partial-{uuid.uuid4().hex[:8]}"
    walk = os.walk(folder, followlinks=True)  # links, so that a caller can put a folder together without copying it
    files = sorted(Path(root, name).relative_to(folder).as_posix() for root, _, names in walk for name in names)

    def upload(name: str) -> int:
        source = Path(folder) / name
        options = {"chunksize": _MULTIPART_CHUNK} if "s3" in fs.protocol else {}
        _retried(lambda: fs.put_file(str(source), f"{staging}/{name}", **options), uri)
        return source.stat().st_size

    with _reported(uri):
        try:
            for parent in sorted({os.path.dirname(f"{staging}/{name}") for name in files}):
                fs.makedirs(parent, exist_ok=True)
            size = sum((Path(folder) / name).stat().st_size for name in files)
            _transfer("publishing", uri, upload, [(name,) for name in files], size)
            (_commit_by_copy if is_remote(uri) else _commit_by_rename)(fs, staging, target, files)
        finally:
            with contextlib.suppress(Exception):
                fs.rm(staging, recursive=True)


def check_writable(uri: str) -> None:
    """Raises InputError unless something can be written beside `uri`: better now than after the training."""
    fs, target = filesystem(uri)
    probe = f"{os.path.dirname(target)}/.{os.path.basename(target)}.probe-{uuid.uuid4().hex[:8]}"
    with _reported(uri):
        fs.makedirs(os.path.dirname(target), exist_ok=True)
        _retried(lambda: fs.pipe_file(probe, b"probe"), uri)
        fs.rm_file(probe)


def check_replaceable(uri: str) -> None:
    """Raises InputError if something else than a run lies at `uri`: publishing replaces all of it."""
    fs, target = filesystem(uri)
    with _reported(uri):
        fs.invalidate_cache()
        if not any(fs.exists(f"{target}/{name}") for name in (RUN_FILE, INCOMPLETE)) and fs.find(target):
            raise InputError(
                f"{uri}: holds other things (and no {RUN_FILE}), which publishing would replace; name a place of its own"
            )


def _commit_by_rename(fs: AbstractFileSystem, staging: str, target: str, files: list[str]) -> None:
    old = f"{staging}.old"
    if os.path.lexists(target):
        os.rename(target, old)
    os.rename(staging, target)
    shutil.rmtree(old, ignore_errors=True)


def _commit_by_copy(fs: AbstractFileSystem, staging: str, target: str, files: list[str]) -> None:
    fs.invalidate_cache()
    marker = f"{target}/{INCOMPLETE}"
    earlier = [name[len(target) + 1 :] for name in fs.find(target) if name != marker] if fs.exists(target) else []
    _retried(lambda: fs.pipe_file(marker, b""), target)
    _by_rank(earlier, lambda name: fs.rm_file(f"{target}/{name}"), target, reverse=True)
    _by_rank(files, lambda name: fs.cp_file(f"{staging}/{name}", f"{target}/{name}"), target)
    _retried(lambda: fs.rm_file(marker), target)


def _by_rank(names: Iterable[str], action: Callable[[str], Any], uri: str, reverse: bool = False) -> None:
    """Runs `action` on several names at a time, those of one rank after those of the rank before."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for _, group in groupby(sorted(names, key=_rank, reverse=reverse), _rank):
            list(pool.map(lambda name: _retried(partial(action, name), uri), group))


def _rank(name: str) -> int:
    """2 for a model's config.json, without which nothing loads it; 1 for the indices through which files are found; 0 for the rest."""
    return 2 if os.path.basename(name) == "config.json" else 1 if name.endswith(".json") else 0


# ------------------------------------------------------------------------------------------------ transfers and errors


def _transfer(verb: str, uri: str, work: Callable[..., int], items: list[tuple[Any, ...]], size: int) -> None:
    """Runs `work(*item)` (returns bytes moved) on several threads under a progress bar; the first failure ends it."""
    from tqdm import tqdm

    interactive = sys.stderr.isatty()
    with (
        tqdm(
            total=size,
            desc=f"{verb} {uri}",
            unit="B",
            unit_scale=True,
            mininterval=0.5 if interactive else 15,
            delay=PROGRESS_DELAY,
        ) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        futures = [pool.submit(work, *item) for item in items]
        try:
            for future in futures:
                bar.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _retried(action: Callable[[], T], uri: str) -> T:
    """Runs one idempotent transfer, again after network trouble."""
    for delay in RETRY_DELAYS:
        try:
            return action()
        except Exception as e:
            if not _transient(e):
                raise
            print(f"{uri}: {_one_line(e)}; again in {delay:g} s", file=sys.stderr, flush=True)
            time.sleep(delay)
    return action()


def _transient(error: Exception) -> bool:
    """Network trouble and overload, as against what will fail again (missing, not allowed, no space left)."""
    if isinstance(error, FileNotFoundError | PermissionError | InputError):
        return False
    module = type(error).__module__.split(".")[0]
    if isinstance(error, OSError):
        return error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EINVAL)
    return module in ("botocore", "aiobotocore", "aiohttp", "asyncio") and "Credentials" not in type(error).__name__


@contextlib.contextmanager
def _reported(uri: str) -> Iterator[None]:
    """Turns what storage can raise into one line that names the URI."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{uri}: no such file or folder") from None
    except PermissionError as e:
        raise InputError(f"{uri}: not allowed: {_one_line(e)}") from None
    except OSError as e:
        raise InputError(f"{uri}: {os.strerror(e.errno) if e.errno else _one_line(e)}") from None
    except Exception as e:
        if type(e).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp"):
            raise InputError(f"{uri}: {_one_line(e)}") from None
        raise


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
