"""Storage on local folders and in memory; the same on a real S3 server is in tests/conformance/test_s3.py."""

import errno
import os
import threading
from pathlib import Path

import fsspec
import pytest

from xtoken_core import storage
from xtoken_core.errors import InputError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    """A place to publish at."""
    yield str(tmp_path / "out") if request.param == "local" else f"memory://{tmp_path.name}/out"
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def folder(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def contents(uri: str) -> dict[str, str]:
    root = storage.local_copy(uri)
    return {p.relative_to(root).as_posix(): p.read_text() for p in sorted(root.rglob("*")) if p.is_file()}


def test_what_is_published_is_what_is_read(tmp_path, place, cache):
    storage.publish(folder(tmp_path / "in", a="1", model__config="{}", model__weights="0" * 1000), place)
    assert contents(place) == {"a": "1", "model/config": "{}", "model/weights": "0" * 1000}
    assert storage.local_copy(f"{place}/a").read_text() == "1"
    assert storage.open_text(f"{place}/model/config").read() == "{}"


def test_publishing_again_replaces_everything(tmp_path, place, cache):
    storage.publish(folder(tmp_path / "one", a="1", b="2"), place)
    before = storage.fingerprint(place)
    storage.publish(folder(tmp_path / "two", a="3"), place)
    assert contents(place) == {"a": "3"}
    assert storage.fingerprint(place) != before


def test_links_are_followed(tmp_path, place, cache):
    folder(tmp_path / "elsewhere", weights="w")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "best").symlink_to(tmp_path / "elsewhere")
    storage.publish(tmp_path / "in", place)
    assert contents(place) == {"best/weights": "w"}


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    source = folder(tmp_path / "in", a="1", b="2")
    local = type(fsspec.filesystem("file"))
    put, count = local.put_file, []

    def full(self, *args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(self, *args, **kwargs)

    monkeypatch.setattr(local, "put_file", full)
    with pytest.raises(InputError, match="/out: No space left on device$"):
        storage.publish(source, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["in"]


def test_a_place_that_is_no_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory|File exists"):
        storage.publish(folder(tmp_path / "in", a="1"), str(tmp_path / "file" / "out"))
    with pytest.raises(InputError, match="Not a directory|File exists"):
        storage.check_writable(str(tmp_path / "file" / "out"))


@pytest.mark.parametrize("place", ["{}/out", "memory://bucket/{}/out"])
def test_only_a_run_is_replaced(tmp_path, place):
    target = place.format(tmp_path).replace("///", "//")
    storage.check_replaceable(target)
    storage.publish(folder(tmp_path / "model", weights="1"), f"{target}/other")
    with pytest.raises(InputError, match=f"^{target}: holds other things"):
        storage.check_replaceable(target)
    storage.publish(folder(tmp_path / "run", **{"run.json": "{}"}), target)
    storage.check_replaceable(target)


def test_a_reader_never_sees_half(tmp_path, cache):
    """Readers poll while a folder is published again and again: each sees one version, whole."""
    versions = [folder(tmp_path / str(n), **{f"f{i}": str(n) for i in range(20)}) for n in (0, 1)]
    target, stop, seen = tmp_path / "out", threading.Event(), []
    storage.publish(versions[0], str(target))

    def read() -> None:
        while not stop.is_set():
            try:
                handle = os.open(target, os.O_RDONLY)  # a folder held open stays the one it was
            except FileNotFoundError:
                continue
            try:
                seen.append([Path(f"/proc/self/fd/{handle}/f{i}").read_text() for i in range(20)])
            except FileNotFoundError:
                seen.append(None)  # the old version, removed under the reader's hands
            os.close(handle)

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(30):
        storage.publish(versions[n % 2], str(target))
    stop.set()
    reader.join()
    whole = [files for files in seen if files]
    assert len(whole) > 5
    assert all(files in (["0"] * 20, ["1"] * 20) for files in whole)


def test_half_published_folders_are_refused(tmp_path, cache):
    uri = f"memory://{tmp_path.name}/out"
    storage.publish(folder(tmp_path / "in", a="1", best__b="2"), uri)
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/out/{storage.INCOMPLETE}", b"")
    for path in (uri, f"{uri}/best", f"{uri}/best/b"):
        with pytest.raises(InputError, match="half-published"):
            storage.local_copy(path)
    assert storage.folders(f"memory://{tmp_path.name}") == []


def test_downloads_are_reused_until_the_original_changes(tmp_path, cache):
    uri = f"memory://{tmp_path.name}/out"
    storage.publish(folder(tmp_path / "in", a="1"), uri)
    first = storage.local_copy(uri)
    stamp = (first / "a").stat().st_mtime_ns
    assert storage.local_copy(uri) == first
    assert (first / "a").stat().st_mtime_ns == stamp
    storage.publish(folder(tmp_path / "in", a="2"), uri)
    assert (storage.local_copy(uri) / "a").read_text() == "2"
    assert not list(cache.glob("*.partial-*"))


def test_expand_takes_files_folders_and_globs_in_a_fixed_order(tmp_path):
    root = folder(tmp_path, b__y="", b__x="", b__c__z="", a="", **{".hidden": "", "b__.d__w": ""})
    listed = storage.expand([f"{root}/b", f"{root}/a", f"{root}/b/*"])
    assert [Path(path).relative_to(root).as_posix() for path in listed] == ["b/c/z", "b/x", "b/y", "a"]


@pytest.mark.parametrize("uri", ["absent", "absent/*.txt", "memory://absent/x", "file:///absent"])
def test_what_is_not_there_is_named(uri, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    for read in (lambda: storage.expand([uri]), lambda: storage.fingerprint(uri), lambda: storage.local_copy(uri)):
        with pytest.raises(InputError, match=f"^{uri.replace('*', '.')}: no such file"):
            read()


def test_an_unknown_protocol_is_said():
    with pytest.raises(InputError, match="^nope://x: .*nope"):
        storage.local_copy("nope://x")


def test_a_fingerprint_follows_content_and_names(tmp_path):
    root = folder(tmp_path / "in", a="1", b="1")
    first = storage.fingerprint(str(root))
    assert storage.fingerprint(f"file://{root}") == first
    (root / "b").rename(root / "c")
    second = storage.fingerprint(str(root))
    (root / "c").write_text("12")
    assert len({first, second, storage.fingerprint(str(root))}) == 3
