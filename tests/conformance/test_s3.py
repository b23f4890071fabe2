"""Storage and a whole run on a real S3 server, SeaweedFS, which is also killed in the middle of things."""

import asyncio
import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import s3fs
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.warm import fork
from tests.support.cli import call
from tests.support.tiny import texts, tiny_model, tiny_run
from tests.support.training_run import losses, prepare, stands_still
from tests.support.weed import KEYS, Weed
from xtoken_core import progress, storage
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.data.reading import load_rows, rows_of_shards
from xtoken_core.errors import InputError
from xtoken_core.models import load_model
from xtoken_core.projection import Projection
from xtoken_core.results.pilot import Pilot
from xtoken_core.spec import CandidateSpec, DistillationSpec
from xtoken_core.storage import claims
from xtoken_core.teachers.handle import Teacher
from xtoken_core.training.distill import distill
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.workflow.pilot import run_place
from xtoken_core.workflow.rungs import Place
from xtoken_core.workflow.scoring import score_teacher
from xtoken_core.workflow.views import View
from xtoken_core.workflow.vocabularies import write_projections

MIB = 2**20

SECRETS = {
    name: f"planted-{name.lower()}" for name in ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "KF_PIPELINES_TOKEN")
}
"""What a user's environment may hold, and nothing may repeat."""


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def s3(weed, tmp_path, monkeypatch):
    """The server's file system, a bucket in it, and this process set up as a user's would be."""
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(claims, "REFRESH", 0.5)
    monkeypatch.setattr(claims, "PATIENCE", 2.0)
    return weed.enter(monkeypatch, "bucket")


@pytest.fixture
def calls(monkeypatch):
    """What is asked of S3, as (method, arguments), in order."""
    made: list[tuple[str, dict]] = []
    ask = s3fs.S3FileSystem._call_s3

    async def spy(self, method, *args, **kwargs):
        made.append((method, kwargs))
        return await ask(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", spy)
    return made


def model(folder: Path, size: int, text: str = "one") -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(os.urandom(size))
    (folder / "config").write_text(text)
    return folder


def same(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in ("weights", "config"))


def test_big_files_go_in_parts_and_come_in_ranges_with_progress(tmp_path, calls, capfd, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0)
    source = model(tmp_path / "model", 40 * MIB)
    storage.publish(source, "s3://bucket/parts")
    methods = [method for method, _ in calls]
    assert methods.count("upload_part") == 3  # of 16 MiB
    calls.clear()
    assert same(storage.local_copy("s3://bucket/parts"), source)
    assert sum("Range" in arguments for method, arguments in calls if method == "get_object") == 2  # of 32 MiB
    told = capfd.readouterr().err
    assert "publishing s3://bucket/parts: 100%" in told and "reading s3://bucket/parts: 100%" in told


def test_a_reader_never_sees_half_a_model(tmp_path, s3):
    versions = [model(tmp_path / str(n), 3 * MIB, str(n) * 10) for n in (0, 1)]
    target, done, seen = "s3://bucket/atomic", threading.Event(), []

    def read() -> None:
        while not done.is_set():
            try:
                seen.append(storage.local_copy(target))
            except InputError as e:
                assert any(reason in str(e) for reason in ("no such file", "half-published", "changed while"))

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for n in (0, 1, 0, 1, 0):
            storage.publish(versions[n], target)
        while not (seen and same(seen[-1], versions[0])) and not reader.done():
            time.sleep(0.02)
        done.set()
        reader.result()
    assert all(same(copy, versions[0]) or same(copy, versions[1]) for copy in seen)
    assert sorted(s3.find("bucket/atomic")) == ["bucket/atomic/config", "bucket/atomic/weights"]
    assert not [path for path in s3.find("bucket") if "partial" in path]


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Two versions of a model in shards, of which the first one has more; every file of a version differs from the other's."""
    root = tmp_path_factory.mktemp("students")
    for version, vocabulary in enumerate((400, 500)):
        tiny_model(root / f"{version}.whole", vocabulary, seed=version)
        loaded = AutoModelForCausalLM.from_pretrained(root / f"{version}.whole")
        loaded.config.version = version
        loaded.save_pretrained(root / str(version), max_shard_size=("20KB", "60KB")[version])
        AutoTokenizer.from_pretrained(root / f"{version}.whole").save_pretrained(root / str(version))
    shards = [len(list((root / str(version)).glob("*.safetensors"))) for version in (0, 1)]
    assert shards[0] > shards[1] > 1
    return [root / "0", root / "1"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_readers_never_load_half_a_model(students, s3, tmp_path, monkeypatch):
    """A reader that knows nothing of markers, fsspec and transformers alone, polls while two versions replace each other slowly."""
    ask = s3fs.S3FileSystem._call_s3

    async def slow(self, method, *args, **kwargs):
        """No copy begins before the reader has looked once more."""
        before = missing
        while method == "copy_object" and missing == before and not reader.done():
            await asyncio.sleep(0.01)
        return await ask(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", slow)
    versions, done, missing, loaded = [files_of(student) for student in students], threading.Event(), 0, []

    def read() -> None:
        nonlocal missing
        for attempt in itertools.count():
            if done.is_set():
                return
            reader, copy = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False), tmp_path / str(attempt)
            try:
                reader.get("bucket/llama/student/best", str(copy), recursive=True)
                model, tokenizer = AutoModelForCausalLM.from_pretrained(copy), AutoTokenizer.from_pretrained(copy)
            except (OSError, ValueError):  # gone under its hands, or transformers finds no model there
                missing += 1
                time.sleep(0.02)
                continue
            assert files_of(copy) == versions[model.config.version]
            assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
            loaded.append(model.config.version)

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for turn, version in enumerate((0, 1, 0)):
            root = tmp_path / f"in-{turn}" / "student"
            root.mkdir(parents=True)
            (root / "best").symlink_to(students[version])
            storage.publish(root.parent, "s3://bucket/llama")
            while loaded[-1:] != [version] and not reader.done():
                time.sleep(0.02)
        done.set()
        reader.result()
    assert missing > 3


def test_config_goes_first_and_comes_last(students, s3, calls):
    """In the order of what is asked of the store: so that no reader finds config.json and not the rest."""
    storage.publish(students[0], "s3://bucket/ordered")
    calls.clear()
    storage.publish(students[1], "s3://bucket/ordered")
    asked = [
        (method.removesuffix("_object"), arguments["Key"].removeprefix("ordered/"))
        for method, arguments in calls
        if method in ("copy_object", "delete_object") and arguments["Key"].startswith("ordered/")
    ]
    assert asked.pop() == ("delete", storage.INCOMPLETE)
    assert asked[0] == ("delete", "config.json") and asked[-1] == ("copy", "config.json")
    changes = [method for method, _ in asked]
    assert changes == ["delete"] * len(list(students[0].iterdir())) + ["copy"] * len(list(students[1].iterdir()))
    shards = [number for number, (_, name) in enumerate(asked) if name.endswith(".safetensors")]
    assert shards == list(range(shards[0], shards[-1] + 1))  # the last to go and the first to come


@contextlib.contextmanager
def interrupted(weed: Weed, method: str, then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within, the server is killed when `method` is first asked of it; `then` is called beside the client's attempts.

    Between two of them the client waits as long as it likes, until `then` has been done.
    """
    ask, pause, done = s3fs.S3FileSystem._call_s3, asyncio.sleep, threading.Event()
    after = threading.Thread(target=lambda: (then(), done.set()))

    async def strike(self, asked, *args, **kwargs):
        if asked == method and after.ident is None:
            weed.kill()
            after.start()
        return await ask(self, asked, *args, **kwargs)

    async def wait(seconds, *result):
        until = time.monotonic() + seconds
        while not done.is_set() and time.monotonic() < until:
            await pause(0.05)
        return await pause(0, *result)

    with mock.patch.object(s3fs.S3FileSystem, "_call_s3", strike), mock.patch.object(asyncio, "sleep", wait):
        yield
    after.join()


def test_a_server_that_dies_and_returns_is_tried_again(tmp_path, weed, monkeypatch):
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    source = model(tmp_path / "model", 40 * MIB)

    def return_() -> None:
        time.sleep(0.5)
        weed.start()

    with interrupted(weed, "upload_part", return_):
        storage.publish(source, "s3://bucket/returned")
    with interrupted(weed, "get_object", return_):
        assert same(storage.local_copy("s3://bucket/returned"), source)


def test_a_server_that_dies_for_good_is_reported_with_nothing_half_written(tmp_path, weed):
    old = model(tmp_path / "old", MIB)
    storage.publish(old, "s3://bucket/kept")
    with interrupted(weed, "upload_part"), pytest.raises(InputError, match="^s3://bucket/kept: ") as caught:
        storage.publish(model(tmp_path / "new", 40 * MIB), "s3://bucket/kept")
    assert "\n" not in str(caught.value)
    weed.start()
    assert same(storage.local_copy("s3://bucket/kept"), old)


def test_empty_folders_that_the_store_keeps_hold_nothing(s3):
    """SeaweedFS lists a folder whose objects are gone."""
    s3.pipe({"bucket/left/one/a": b"1", "bucket/left/two/a": b"1"})
    storage.remove("s3://bucket/left/one")
    assert storage.folders("s3://bucket/left") == ["s3://bucket/left/two"]
    with pytest.raises(InputError, match="^s3://bucket/left/one: no such file"):
        storage.local_copy("s3://bucket/left/one")


def test_what_is_not_there_and_what_is_not_allowed(monkeypatch):
    with pytest.raises(InputError, match="^s3://bucket/absent: no such file"):
        storage.local_copy("s3://bucket/absent")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match="^s3://bucket/x: not allowed"):
        storage.check_place("s3://bucket/x", "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run, whose models and texts `in_bucket` moves."""
    folder = tmp_path_factory.mktemp("run")
    return folder, tiny_run(folder)


def in_bucket(s3, folder: Path, spec: dict) -> dict:
    for name in ("student", "other", "same", "train"):
        storage.publish(folder / name, f"s3://bucket/in/{name}")
    s3.put_file(str(folder / "held-out.jsonl"), "bucket/in/held-out.jsonl")
    return json.loads(json.dumps(spec).replace(str(folder), "s3://bucket/in"))


def test_a_whole_run_with_a_pilot_from_and_to_buckets(run, s3, tmp_path):
    """Shards of rows, their scores, short runs, a verdict and the main run that it chooses, with secrets in the environment."""
    spec = in_bucket(s3, *run)
    with s3.open("bucket/in/held-out.jsonl", "a") as file:  # a pilot needs two documents
        file.write(json.dumps({"text": texts(6)[5][:600]}) + "\n")
    spec["output"]["uri"] = "s3://bucket/out"
    spec["teachers"][1]["scores"] = {"top_k": 8}
    spec["data"]["shards"] = 2
    spec["training"] |= {"max_steps": 12, "save_steps": 2}
    spec["pilot"] = {"candidates": [{"name": "read", "teachers": ["same"]}], "budget": 1, "then": "best"}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    done = call("pipelines", "run", tmp_path / "spec.yaml", "--runs", tmp_path / "runs", **SECRETS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "s3://bucket/out/report.html" in done.stdout
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written |= s3.cat(s3.find("bucket/out")) | {"terminal": (done.stdout + done.stderr).encode()}
    assert len(written) > 100
    secrets = [secret.encode() for secret in (*SECRETS.values(), KEYS["AWS_SECRET_ACCESS_KEY"])]
    assert [name for name, data in written.items() if any(secret in data for secret in secrets)] == []
    assert {path.split("/")[2] for path in s3.find("bucket/out")} == {
        "report.html", "run.json", "spec.yaml", "published.json", "student", "logs", "projections", "serving", "pilot.json"
    }  # fmt: skip
    pilot = Pilot.parse(s3.cat("bucket/out/pilot.json").decode(), "pilot.json")
    assert [(trial.candidate, trial.steps) for trial in pilot.trials] == [("ce", 2), ("read", 2), ("ce", 4), ("read", 4)]
    assert f"as the pilot chose: {pilot.chosen}" in done.stdout and pilot.reason in done.stdout
    assert load_model("s3://bucket/out/student/best").config.num_hidden_layers == 2


def test_a_distill_that_is_pre_empted_and_tried_again_goes_on_from_its_uri(run, s3, tmp_path):
    """Killed with nothing left but what is in the bucket, as on a node that is taken away; KFP then starts it anew, elsewhere."""
    folder, spec = run
    spec = spec | {"teachers": spec["teachers"][1:], "training": spec["training"] | {"max_steps": 9, "save_steps": 5}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    for split in ("train", "validation"):
        prepare_rows(DistillationSpec.from_text(json.dumps(spec)), tmp_path / "rows" / split, split)

    def command(out: Path) -> list[str | Path]:
        options = ["--spec", tmp_path / "spec.yaml", "--rows", tmp_path / "rows", "--run", out]
        return ["components.distill", *options, "--checkpoints", "s3://bucket/kept"]

    def kept() -> list[str]:
        return [checkpoint for own in storage.folders("s3://bucket/kept") for checkpoint in storage.folders(own)]

    first, output = fork(stands_still, 7, call, *command(tmp_path / "one" / "run"))
    while not kept():
        assert first.is_alive(), output.read()
        time.sleep(0.1)
    first.kill()
    first.join()
    assert first.exitcode == -9
    done = call(*command(tmp_path / "two" / "run"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "run" / "summary.json").read_text())["resumed_from"] == 5
    assert kept()  # until the run is published


def test_shards_hold_the_rows_of_one_and_are_streamed(run, s3, tmp_path):
    """Three prepare tasks, in any order, make the rows of one; training reads a shard when it comes to it."""
    spec = DistillationSpec.from_text(json.dumps(run[1]))
    sharded = DistillationSpec.from_text(json.dumps(run[1]), ["data.shards=3"])
    prepare_rows(spec, tmp_path / "whole", "train")
    for shard in (2, 0, 1):
        prepare_rows(sharded, tmp_path / "shards" / str(shard), "train", shard)
        storage.publish(tmp_path / "shards" / str(shard), f"s3://bucket/rows/{shard}/train")
    rows = rows_of_shards(sharded.data, [f"s3://bucket/rows/{shard}" for shard in range(3)])

    def key(row):
        return int(row["document"]), tuple(int(i) for i in row["student_ids"])

    import torch

    whole = sorted(key(row) for row in load_rows(tmp_path / "whole"))
    order = rows.order(torch.Generator().manual_seed(1)).tolist()
    assert sorted(order) == list(range(len(whole)))
    cached = list((tmp_path / "cache").glob("*.lock"))
    first = key(rows[order[0]])
    rows._pool.shutdown()  # the one that follows is under way
    fetched = len(list((tmp_path / "cache").glob("*.lock"))) - len(cached)
    assert fetched <= 2
    rows = rows_of_shards(sharded.data, [f"s3://bucket/rows/{shard}" for shard in range(3)])
    streamed = [key(rows[i]) for i in order]
    assert streamed[0] == first and sorted(streamed) == whole


def test_scores_of_shards_go_through_the_store_and_serve_a_second_student(tmp_path, s3):
    """Rows and scores of two shards, to the store and from it: the training is that on the folders, also of another student of the tokenizer."""
    values = prepare(tmp_path, data={"shards": 2}, loss={"mode": "partition_kl"}, training={"max_steps": 3, "save_steps": 1})
    values["teachers"] = [values["teachers"][0] | {"scores": {"top_k": 8}}]
    spec = DistillationSpec.model_validate(values)
    for shard in range(2):
        for split in ("train", "validation")[: 2 - shard]:
            prepare_rows(spec, tmp_path / f"rows-{shard}" / split, split, shard)
        score_teacher(spec, "other", tmp_path / f"rows-{shard}", tmp_path / f"scores-{shard}")
        for name in (f"rows-{shard}", f"scores-{shard}"):
            storage.publish(tmp_path / name, f"s3://bucket/shared/{name}")
    second = DistillationSpec.model_validate(values | {"student": {"model": str(tiny_model(tmp_path / "second", 400, seed=9))}})
    for name, place in (("w", str(tmp_path)), ("w-s3", "s3://bucket/shared")):  # of the rows of both shards
        write_projections(spec, tmp_path / name, [f"{place}/rows-{shard}" for shard in range(2)])
    stored = [Projection.load(tmp_path / name / "other.safetensors").cells for name in ("w", "w-s3")]
    assert stored[0].digest() == stored[1].digest() != Projection.load(tmp_path / "w.safetensors").cells.digest()
    w, found = {"other": tmp_path / "w.safetensors"}, {}
    with mock.patch.object(Teacher, "__init__", side_effect=AssertionError("a teacher was started")):
        for place in (str(tmp_path), "s3://bucket/shared"):
            for name, student in (("first", spec), ("second", second)):
                rows, scores = (tuple(f"{place}/{kind}-{shard}" for shard in range(2)) for kind in ("rows", "scores"))
                out = tmp_path / f"{name}-{place.partition(':')[0].strip('/').replace('/', '-')}"
                distill(student, TrainingInputs(rows, {}, w, {"other": scores}), out)
                found[place, name] = losses(out)
    assert found[str(tmp_path), "first"] == found["s3://bucket/shared", "first"] != found["s3://bucket/shared", "second"]
    assert found[str(tmp_path), "second"] == found["s3://bucket/shared", "second"]
    short = Place(1, 1.0, CandidateSpec(name="read"))
    rows, scores = (tuple(f"s3://bucket/shared/{kind}-{shard}" for shard in range(2)) for kind in ("rows", "scores"))
    inputs = TrainingInputs(rows, {}, w, {"other": scores})
    trial = run_place(View.from_text(spec.to_json()), short, inputs, tmp_path / "short", "s3://bucket/kept-of-trials")
    assert [line[1] for line in losses(tmp_path / "short")] == [line[1] for line in found["s3://bucket/shared", "first"]]
    assert trial.bits_per_byte and storage.folders("s3://bucket/kept-of-trials") == []  # no student and no checkpoint stays


def test_stored_scores_are_named_by_their_uri(tmp_path, s3):
    """`scores: {uri: ...}`: another run, another loss beside, the same rows."""
    values = prepare(tmp_path, loss={"mode": "partition_kl"}, training={"max_steps": 2})
    teacher = values["teachers"][0]
    scored = values | {"teachers": [teacher | {"scores": {"top_k": 8}}]}
    score_teacher(DistillationSpec.model_validate(scored), "other", tmp_path / "rows", tmp_path / "scores")
    storage.publish(tmp_path / "scores", "s3://bucket/kept/other")
    again = values | {"teachers": [teacher | {"id": "renamed", "scores": {"uri": "s3://bucket/kept/other"}}], "name": "again"}
    spec = DistillationSpec.model_validate(again | {"loss": again["loss"] | {"dynamic_scaling": 0.3}})
    for split in ("train", "validation"):
        prepare_rows(spec, tmp_path / "again" / split, split)
    distill(spec, TrainingInputs((tmp_path / "again",), {}, {"renamed": tmp_path / "w.safetensors"}), tmp_path / "out")
    assert len(losses(tmp_path / "out")) == 2
