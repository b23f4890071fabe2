"""Storage on local folders and in memory; the same on a real S3 server is in tests/conformance/test_s3.py."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace

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
        storage.check_place(str(tmp_path / "file" / "out"), "run")


def published(root: Path, name: str, place: str, **files: str) -> None:
    """A run of this name, published as `finish` does."""
    manifest = storage.Manifest.of_folder(folder(root, **files), name)
    storage.publish(folder(root, **{storage.MANIFEST: manifest.model_dump_json()}), place)


def refused(place: str, name: str = "mine") -> str:
    with pytest.raises(InputError) as caught:
        storage.check_place(place, name)
    storage.check_place(place, name, replace=True)
    return str(caught.value)


def test_only_a_run_of_the_same_name_is_replaced_unasked(tmp_path, place):
    storage.check_place(place, "mine")
    published(tmp_path / "mine", "mine", place, a="1", student__best="")
    storage.check_place(place, "mine")
    assert "holds the run 'mine', which publishing 'other' would delete" in refused(place, "other")
    fs, path = storage.filesystem(place)
    fs.pipe_file(f"{path}/student/.notes", b"years of work")
    assert "holds 'student/.notes', which no run put there" in refused(place)


@pytest.mark.parametrize(
    "files", [{"thesis.tex": ""}, {"run.json": "{}"}, {"published.json": '{"name": "mine", "files": []}'}, {".hidden": ""}]
)
def test_what_no_run_published_is_not_replaced_unasked(tmp_path, place, files):
    storage.publish(folder(tmp_path / "in", **files), place)
    assert "holds other things" in refused(place)


@pytest.mark.parametrize("died_at", range(1, 9))
def test_what_a_publication_that_died_left_is_its_own(tmp_path, died_at, monkeypatch):
    """On a store without renames, at each of its requests; a run of another name may not take the place, the same one may."""
    place = f"memory://{tmp_path.name}-{died_at}/out"
    published(tmp_path / "one", "mine", place, a="1", **{"config.json": "", "old": ""})
    requests = []

    def dying(method):
        def request(self, *args, **kwargs):
            requests.append(method)
            if len(requests) >= died_at:
                raise KeyboardInterrupt
            return method(self, *args, **kwargs)

        return request

    memory = type(fsspec.filesystem("memory"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("pipe_file", "rm_file", "copy"):
            patch.setattr(memory, name, dying(getattr(memory, name)))
        published(tmp_path / "two", "mine", place, a="2", **{"config.json": "", "new": ""})
    storage.check_place(place, "mine")
    assert "other" in refused(place, "other")
    published(tmp_path / "two", "mine", place)
    assert sorted(contents(place)) == ["a", "config.json", "new", storage.MANIFEST]
    fsspec.filesystem("memory").store.clear()


def test_links_files_and_mount_points_are_no_places(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "file").write_text("")
    for name, reason in (("link", "symbolic link"), ("file", "is a file")):
        with pytest.raises(InputError, match=f"/{name}: .*{reason}"):
            storage.check_place(str(tmp_path / name), "run", replace=True)
    for place in ("/proc", "/dev/shm"):
        with pytest.raises(InputError, match="is a mount point"):
            storage.check_place(place, "run", replace=True)
    assert (tmp_path / "link").is_symlink()


def test_a_disk_without_room_for_the_students_is_said_before(tmp_path, monkeypatch):
    model = folder(tmp_path / "model", weights="0" * 1000)
    storage.check_space(str(tmp_path / "a" / "out"), str(model))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1999))
    with pytest.raises(InputError, match="out: 0.0 GB are free, and 2 copies of the student need 0.0 GB"):
        storage.check_space(str(tmp_path / "a" / "out"), str(model))


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

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for n in count():
            storage.publish(versions[n % 2], str(target))
            if reader.done() or (n >= 30 and sum(files is not None for files in list(seen)) > 5):
                break
        stop.set()
        reader.result()
    assert all(files in (["0"] * 20, ["1"] * 20) for files in seen if files)


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
    assert not list(cache.glob("*.partial*"))


@pytest.mark.parametrize("harm", [lambda path: path.write_text(""), Path.unlink], ids=["empty", "gone"])
@pytest.mark.parametrize("name", ["", "/sub/a"], ids=["folder", "file"])
def test_a_download_that_a_power_cut_has_emptied_is_made_again(tmp_path, cache, name, harm):
    uri = f"memory://{tmp_path.name}/out"
    fsspec.filesystem("memory").pipe({f"/{tmp_path.name}/out/sub/a": b"1", f"/{tmp_path.name}/out/b": b"22"})
    copy = storage.local_copy(uri + name)
    file = copy if name else copy / "sub" / "a"
    harm(file)
    assert storage.local_copy(uri + name) == copy and file.read_bytes() == b"1"


def test_expand_takes_files_folders_and_globs_in_a_fixed_order(tmp_path):
    root = folder(tmp_path, b__y="", b__x="", b__c__z="", a="", **{".hidden": "", "b__.d__w": ""})
    listed = storage.expand([f"{root}/b", f"{root}/a", f"{root}/b/*"])
    assert [Path(path).relative_to(root).as_posix() for path in listed] == ["b/c/z", "b/x", "b/y", "a"]


@pytest.mark.parametrize("root", ["{}/run [v2]", "memory://{}/run [v2]"])
def test_names_with_brackets_are_taken_as_they_are(root, tmp_path, cache):
    root = root.format(tmp_path).replace("///", "//")
    for text in ("one", "two"):
        storage.publish(folder(tmp_path / text, **{"a*?[b].txt": text, "c": ""}), f"{root}/in")
    assert contents(f"{root}/in") == {"a*?[b].txt": "two", "c": ""}
    assert len(storage.expand([f"{root}/in/a*?[b].txt"])) == 1 and len(storage.expand([f"{root}/in/a*"])) == 1
    assert storage.fingerprint(f"{root}/in") and storage.folders(root) == [f"{root}/in"]
    storage.remove(f"{root}/in")
    assert storage.folders(root) == []


def test_the_home_folder_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.publish(folder(tmp_path / "in", a="1"), "~/out")
    assert (tmp_path / "out" / "a").read_text() == "1" and storage.local_copy("~/out/a") == tmp_path / "out" / "a"


def test_what_died_is_swept_and_put_back(tmp_path, cache):
    """A publication killed before and between its renames; a download killed on its way."""
    storage.publish(folder(tmp_path / "one", a="1"), str(tmp_path / "out"))
    folder(tmp_path / ".out.partial", half="")
    (tmp_path / "out").rename(tmp_path / ".out.partial.old")
    with pytest.raises(InputError, match="No space"), pytest.MonkeyPatch.context() as full:
        full.setattr(
            "xtoken_core.storage.publishing._upload", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space"))
        )
        storage.publish(folder(tmp_path / "two", a="2"), str(tmp_path / "out"))
    assert contents(str(tmp_path / "out")) == {"a": "1"} and not list(tmp_path.glob(".out*"))
    uri = f"memory://{tmp_path.name}/out"
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/.out.partial/half", b"")
    storage.publish(tmp_path / "two", uri)
    folder(cache / "0123.partial", half="")
    storage.local_copy(uri)
    assert not list(cache.glob("*.partial")) and len(fsspec.filesystem("memory").find(tmp_path.name)) == 1


@pytest.mark.parametrize("uri", ["s3://KEY:PLANTED@bucket/x", "https://host/x?X-Amz-Signature=PLANTED"])
def test_keys_in_uris_are_refused_and_not_repeated(uri):
    with pytest.raises(InputError, match="credentials come from the environment") as caught:
        storage.local_copy(uri)
    assert "PLANTED" not in str(caught.value)


@pytest.mark.parametrize("uri", ["absent", "absent/*.txt", "memory://absent/x", "file:///absent"])
def test_what_is_not_there_is_named(uri, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    for read in (lambda: storage.expand([uri]), lambda: storage.fingerprint(uri), lambda: storage.local_copy(uri)):
        with pytest.raises(InputError, match=f"^{uri.replace('*', '.')}: no such file"):
            read()


@pytest.mark.parametrize("protocol", ["nope", "ftp", "ssh", "zip", "simplecache::s3"])
def test_a_protocol_that_is_not_taken_is_said(protocol):
    with pytest.raises(InputError, match=f"^{protocol}://x: {protocol}:// is not among s3, "):
        storage.local_copy(f"{protocol}://x")


def test_a_fingerprint_follows_content_and_names(tmp_path):
    root = folder(tmp_path / "in", a="1", b="1")
    first = storage.fingerprint(str(root))
    assert storage.fingerprint(f"file://{root}") == first
    (root / "b").rename(root / "c")
    second = storage.fingerprint(str(root))
    (root / "c").write_text("12")
    assert len({first, second, storage.fingerprint(str(root))}) == 3
