"""Two writers of one place: one of them writes, the other gets a line."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pipelines.warm import fork
from xtoken_core import storage
from xtoken_core.errors import InputError
from xtoken_core.storage import claims, publishing, reading
from xtoken_core.training.checkpoints import owned


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "REFRESH", 0.5)
    if request.param == "local":
        return str(tmp_path / "place")
    request.getfixturevalue("weed").enter(monkeypatch, "claims")
    return f"s3://claims/{tmp_path.name}"


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def beside(root: str) -> list[str]:
    """What lies beside a place, hidden files too."""
    fs, path = storage.filesystem(root)
    fs.invalidate_cache()
    return [name for name in fs.find(os.path.dirname(path)) if f"/.{os.path.basename(path)}" in name]


def test_the_second_of_two_publishers_gets_a_line(root, tmp_path, monkeypatch, fault):
    begun, may_go_on, upload = threading.Event(), threading.Event(), publishing._upload

    def slowly(*arguments):
        begun.set()
        assert may_go_on.wait(60)
        upload(*arguments)

    monkeypatch.setattr(publishing, "_upload", slowly)
    first = threading.Thread(target=storage.publish, args=(folder(tmp_path / "one", "one"), root))
    first.start()
    assert begun.wait(60)
    with pytest.raises(InputError, match=f"^{root}: another run publishes there just now$") as told:
        storage.publish(folder(tmp_path / "two", "two"), root)
    may_go_on.set()
    first.join()
    assert (storage.local_copy(root) / "file").read_text() == "one" and beside(root) == []
    storage.publish(tmp_path / "two", root)
    assert (storage.local_copy(root) / "file").read_text() == "two" and beside(root) == []
    fault(
        f"two publishers at once ({root.partition(':')[0] if '://' in root else 'local'})", "one line for the second", told.value
    )


def test_of_many_at_once_one_has_the_place(root, fault):
    held, refused, inside = [], [], threading.Semaphore(1)

    def take(number):
        try:
            with storage.claimed(root, "works"):
                assert inside.acquire(blocking=False)
                held.append(number)
                time.sleep(1.5)  # the others look meanwhile, or later and have it after this one
                inside.release()
        except InputError as e:
            refused.append(str(e))

    threads = [threading.Thread(target=take, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held and len(held) + len(refused) == 6 and set(refused) <= {f"{root}: another run works there just now"}
    assert beside(root) == []


def hold(root: str, ready: str) -> None:
    """Holds a checkpoint folder, and so would a copy that outlives it, as one that loads rows does for seconds."""
    claims.REFRESH = 0.5
    with owned(None, root):
        if copy := os.fork():
            Path(f"{ready}.part").write_text(str(copy))
            os.rename(f"{ready}.part", ready)
        time.sleep(600)


def test_what_a_killed_run_had_claimed_is_free_again(root, tmp_path, monkeypatch, fault):
    """Its checkpoint folder; at once where the system holds locks, after a while in an object store."""
    process, _ = fork(hold, root, str(tmp_path / "ready"))
    while not (tmp_path / "ready").exists():
        assert process.is_alive()
        time.sleep(0.01)
    with pytest.raises(InputError, match=f"^{root}: another run keeps its checkpoints there just now$") as told, owned(root):
        pass
    process.kill()
    process.join()
    monkeypatch.setattr(claims, "PATIENCE", 3.0)
    with owned(root):
        assert beside(root)
    assert beside(root) == []
    os.kill(int((tmp_path / "ready").read_text()), signal.SIGKILL)  # it still ran
    kind = "s3" if "://" in root else "local"
    fault(f"a second run on one checkpoint folder ({kind}), then SIGKILL for the first", "refused, then free", told.value)


@pytest.mark.parametrize("root", ["s3"], indirect=True)
def test_a_publisher_that_was_frozen_does_not_write_over_its_successor(root, tmp_path, monkeypatch, fault):
    """Its claim was taken over meanwhile. Local locks cannot be lost."""
    upload = publishing._upload

    def frozen(*arguments):
        upload(*arguments)
        fs, path = storage.filesystem(root)
        fs.pipe_file(f"{os.path.dirname(path)}/.{os.path.basename(path)}.claim", b"another")

    monkeypatch.setattr(publishing, "_upload", frozen)
    monkeypatch.setattr(claims, "_refresh", lambda *_: None)  # it is frozen
    with pytest.raises(InputError, match="another run publishes there") as told:
        storage.publish(folder(tmp_path / "one", "one"), root)
    assert storage.folders(root) == []
    fault("a publisher is frozen until another has taken over", "it writes nothing", told.value)


def fork_while_locked(path: Path, ready: Path) -> None:
    with reading._lock(path):
        copy = os.fork()
        if copy == 0:
            time.sleep(600)
            os._exit(0)
    ready.write_text(str(copy))


def test_a_download_s_lock_does_not_stay_with_a_process_forked_meanwhile(tmp_path):
    """As one that loads rows is, while another thread fetches some."""
    process, _ = fork(fork_while_locked, tmp_path / "lock", tmp_path / "ready")
    process.join()
    try:
        with reading._lock(tmp_path / "lock", wait=False):
            pass
    finally:
        os.kill(int((tmp_path / "ready").read_text()), signal.SIGKILL)
