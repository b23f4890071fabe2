"""TensorBoard, Weights & Biases (offline) and MLflow (SQLite) get what log.jsonl gets."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from pathlib import Path
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.training_run import changed, prepare, start, steps
from xtoken_core.errors import InputError
from xtoken_core.results.training import LogLine
from xtoken_core.spec import DistillationSpec
from xtoken_core.training import trackers
from xtoken_core.workflow.resolve import resolve

pytest.importorskip("wandb")
mlflow = pytest.importorskip("mlflow")

pytestmark = pytest.mark.slow
SERIES = ("loss", "ce", "kd", "kd_other", "kd_same", "weight_other", "learning_rate", "grad_norm", "tokens_per_second")


def train(values: dict, folder: Path, out: Path, cwd: Path, **environment: str) -> tuple[int, str]:
    """A training in a process of its own, in the folder `cwd`, with no tracker's settings but `environment`: exit code, and what it printed."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    with contextlib.chdir(cwd), mock.patch.dict(os.environ, plain | {"HOME": str(folder / "home")} | environment, clear=True):
        training = start(values, folder, out)
    printed = training.output.read()
    training.process.join()
    return training.process.exitcode, printed


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    section = {"max_steps": 3, "eval_steps": 3, "report_to": ["tensorboard", "wandb", "mlflow"]}
    return folder, prepare(folder, loss={"weight_metric": "ce"}, training=section)


@pytest.fixture(scope="module")
def tracked(values):
    """The folder that a tracked training wrote."""
    folder, spec = values
    cwd, out = folder / "cwd", folder / "out"
    cwd.mkdir()
    code, printed = train(spec, folder, out, cwd, WANDB_MODE="offline")
    assert code == 0, printed
    assert list(cwd.iterdir()) == []
    return out


def expected(out: Path) -> dict[str, list[tuple[int, float]]]:
    """The series of log.jsonl."""
    lines = [LogLine.model_validate(line) for line in steps(out)]
    return {name: [(line.step, pytest.approx(line.flat()[name], rel=1e-6)) for line in lines] for name in SERIES}


def wandb_records(path: Path) -> list:
    """The records of an offline run's file: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, records, parts = path.read_bytes(), 7, [], b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def test_wandb_offline(tracked):
    [file] = tracked.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(file)
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.project, run.display_name) == ("xtoken", "student from other + same")
    told = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert told["loss"]["weight_metric"] == "ce" and [t["id"] for t in told["teachers"]] == ["other", "same"]
    lines = []
    for record in records:
        if record.HasField("history"):
            lines.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    for name, series in expected(tracked).items():
        assert [(line["train/global_step"], line[f"train/{name}"]) for line in lines if f"train/{name}" in line] == series
    assert sum("eval/validation_bits_per_byte" in line for line in lines) == 2
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def test_mlflow_in_a_database_of_the_run(tracked):
    client = mlflow.tracking.MlflowClient(f"sqlite:///{tracked}/mlflow.db")
    [run] = client.search_runs(["0"])
    assert (run.info.run_name, run.info.status) == ("student from other + same", "FINISHED")
    assert json.loads(run.data.tags["spec"])["training"]["max_steps"] == 3
    for name, series in expected(tracked).items():
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] == series
    assert len(client.get_metric_history(run.info.run_id, "eval_validation_bits_per_byte")) == 2


def test_the_mlflow_run_that_kubeflow_pipelines_has_made_is_used(values, tracked, tmp_path):
    """As its driver makes it: one a step, under one of the pipeline, its id in the environment; `report_to` does not name MLflow."""
    folder, spec = values
    shutil.copy(tracked / "mlflow.db", tmp_path / "server.db")  # one takes seconds to make
    client = mlflow.tracking.MlflowClient(uri := f"sqlite:///{tmp_path}/server.db")
    experiment = client.create_experiment("KFP-Default")
    made = client.create_run(experiment, tags={"mlflow.parentRunId": "of-the-pipeline"}, run_name="distill")
    given = {"MLFLOW_RUN_ID": made.info.run_id, "MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_ID": experiment}
    out = tmp_path / "out"
    code, printed = train(changed(spec, training={"report_to": []}), folder, out, tmp_path, **given)
    assert code == 0, printed
    [run] = client.search_runs([experiment])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (made.info.run_id, "distill", "FINISHED")
    assert run.data.tags["mlflow.parentRunId"] == "of-the-pipeline" and "spec" in run.data.tags
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == expected(out)["loss"]
    assert not (out / "mlflow.db").exists()


def test_no_training_fails_for_an_mlflow_run_that_nobody_asked_for(values, tmp_path):
    folder, spec = values
    given = {"MLFLOW_RUN_ID": "r1", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    code, printed = train(changed(spec, training={"report_to": []}), folder, tmp_path / "out", tmp_path, **given)
    assert code == 0 and "the MLflow run that Kubeflow Pipelines has made is not used: training.report_to: mlflow: " in printed


def test_tensorboard(tracked):
    events = EventAccumulator(str(tracked / "tensorboard")).Reload()
    for name, series in expected(tracked).items():
        assert [(e.step, e.value) for e in events.Scalars(f"train/{name}")] == series


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_runs(values, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else name)
    spec = DistillationSpec.model_validate(changed(values[1], output={"uri": str(tmp_path / "out")}))
    line = r"^training.report_to: mlflow is not installed: pip install mlflow-skinny \(or 'xtoken-pipelines\[tracking\]'\)$"
    with pytest.raises(InputError, match=line):
        resolve(spec.to_json())


def test_an_unknown_tracker_is_bad_input(values):
    with pytest.raises(InputError, match=r"training.report_to.0: not one of tensorboard, wandb, mlflow; did you mean wandb\?"):
        DistillationSpec.from_text(json.dumps(changed(values[1], training={"report_to": ["wandbb"]})))


def test_a_tracker_that_refuses_is_one_line(values, tmp_path):
    """W&B without a key, MLflow without a server to be had."""
    folder, spec = values
    for name, environment in (
        ("wandb", {"WANDB_MODE": "online"}),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}),
    ):
        _, printed = train(changed(spec, training={"report_to": [name]}), folder, tmp_path / name, tmp_path, **environment)
        last = printed.strip().splitlines()[-1]
        assert last.startswith(f"xtoken_core.errors.InputError: training.report_to: {name}: "), printed
