"""Submission with the real `kfp` CLI and client, to a server that stands in for a cluster (see kfp_server.py)."""

import shlex
import sys
from pathlib import Path

import kfp_server_api
import pytest
import yaml
from kfp.cli.__main__ import main as kfp_main

from pipelines.submit import Cluster
from pipelines.warm import fork
from tests.support.cli import call
from tests.support.kfp_server import FakeKfp
from tests.support.tiny import tiny_run
from xtoken_core.report.run import Run
from xtoken_core.spec import ResourcesSpec

ROOT = Path(__file__).parents[2]
IMAGE = "registry.example.org/xtoken@sha256:" + "0" * 64
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with tiny models, texts and spec.yaml (one teacher, nothing evaluated)."""
    folder = tmp_path_factory.mktemp("run")
    resources = {"image": IMAGE, "pvc": [{"name": "work", "mount_path": str(folder)}]}
    spec = tiny_run(folder, teachers=1) | {"evaluation": {"bits_per_byte": False}, "resources": resources}
    spec["output"]["pipelines_ui"] = "https://kubeflow.example.org/pipeline/"
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert call("pipelines", "compile", folder / "spec.yaml", "-o", folder / "compiled.yaml").returncode == 0
    return folder


@pytest.fixture
def server(tmp_path):
    """Takes runs and leaves them be."""
    with FakeKfp(tmp_path / "server") as server:
        yield server


@pytest.fixture
def cluster(tmp_path):
    """Runs what is submitted."""
    with FakeKfp(tmp_path / "server", runs=True) as server:
        yield server


def submit(run, server, *arguments, **environment):
    return call("pipelines", "submit", run / "spec.yaml", "--endpoint", server.url, *arguments, **environment)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("pipelines.submit.POLL_SECONDS", 0.1)


def kfp(server, *arguments):
    """KFP's own command line, in a process of its own; its exit code and what it printed."""
    process, output = fork(_kfp, ["kfp", "--endpoint", server.url, *map(str, arguments)])
    with output:
        printed = output.read()
    process.join()
    return process.exitcode, printed


def _kfp(arguments):
    sys.argv = arguments
    kfp_main()


def test_submit_uploads_runs_and_follows(run, cluster):
    """A version named by the content; the run's link; its tasks as they end; exit 0, and the student lies at the output."""
    done = submit(run, cluster, "--experiment", "new", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    version = next(iter(cluster.versions.values()))["display_name"]
    assert version.startswith("tiny-") and f"{version}: uploading" in done.stdout
    assert f"Run details: {cluster.url}/#/runs/details/" in done.stdout
    for task in ("resolve", "overlap", "projections", "prepare", "distill", "report"):
        assert f"{task}: succeeded" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("SUCCEEDED")
    assert (run / "out" / "student" / "last" / "config.json").exists()
    assert [experiment["display_name"] for experiment in cluster.experiments.values()] == ["new"]
    made_by = Run.published(str(run / "out")).pipeline_run
    assert made_by.id.isdigit() and made_by.url == f"https://kubeflow.example.org/pipeline/#/runs/details/{made_by.id}"
    assert f'<a href="{made_by.url}"' in (run / "out" / "report.html").read_text()

    again = submit(run, cluster, "--set", "student.model=/absent", "--wait")  # overrides go with the run: the same version serves
    assert f"{version}: reused" in again.stdout and len(cluster.versions) == 1
    assert again.returncode == 1
    assert "resolve: failed" in again.stdout and again.stdout.splitlines()[-1].endswith("FAILED")


def test_status_tells_the_last_runs_there(tmp_path):
    with FakeKfp(tmp_path) as server:
        asked = ("status", "--endpoint", server.url)
        assert call("pipelines", *asked).stdout == f"{server.url}: no runs\n"
        for hour, (name, state, tasks) in enumerate(
            [("old", "SUCCEEDED", ()), ("new", "RUNNING", ("distill", "evaluate-teachers"))]
        ):
            details = [{"task_id": task, "display_name": task, "state": "RUNNING"} for task in tasks]
            details.append({"task_id": "resolve", "display_name": "resolve", "state": "SUCCEEDED"})
            run = {"run_id": name, "display_name": name, "state": state, "run_details": {"task_details": details}}
            server.runs[name] = run | {"created_at": f"2026-11-27T0{hour}:00:00Z"}
        told = call("pipelines", *asked)
        assert told.stdout.splitlines() == ["new: RUNNING, at work: distill, evaluate-teachers", "old: SUCCEEDED"]
    gone = call("pipelines", *asked)
    assert gone.returncode == 2 and gone.stderr.count("\n") == 1 and server.url in gone.stderr


def test_an_image_that_is_not_pinned_is_told_and_none_is_refused(run, server):
    tagged, unset = (("--set", f"resources.image={name}") for name in ("example.org/x:1", ResourcesSpec().image))
    caution = "resources.image: example.org/x:1 can come to mean another image"
    assert caution in call("pipelines", "compile", run / "spec.yaml", *tagged).stderr
    nothing = ("--set", "student.model=/absent")  # a run that ends with its first task
    done = submit(run, server, *tagged, *nothing)
    assert done.returncode == 0 and caution in done.stdout
    before = len(server.runs)
    refused = submit(run, server, *unset)
    assert refused.returncode == 2 and refused.stderr.startswith(f"{run}/spec.yaml: resources.image: not set; build ")
    assert refused.stderr.count("\n") == 1 and len(server.runs) == before
    assert "resources.image" not in submit(run, server, *nothing).stdout


def test_a_changed_workflow_is_a_new_version(run, server):
    before = len(server.versions)
    assert submit(run, server, "--set", "resources.memory=1Gi").returncode == 0
    assert len(server.versions) == before + 1


def test_two_users_have_a_pipeline_each(run, tmp_path):
    """Of one name, in the namespace of each, and found again there."""
    nothing = ("--set", "student.model=/absent")
    with FakeKfp(tmp_path, multi_user=True) as server:
        for namespace, word in (("ann", "uploading"), ("ann", "reused"), ("ben", "uploading")):
            done = submit(run, server, "--namespace", namespace, *nothing)
            assert done.returncode == 0, done.stderr
            assert f": {word}" in done.stdout
        for made in (server.pipelines, server.experiments):
            assert [item["namespace"] for item in made.values()] == ["ann", "ben"]
        refused = submit(run, server, *nothing)
        assert refused.returncode == 2 and "namespace is empty" in refused.stderr


def test_two_submissions_at_once_share_one_pipeline(run, tmp_path, monkeypatch):
    """One has looked before the other has made it: the server says 409, and it is looked for again."""
    nothing = ("--set", "student.model=/absent")
    with FakeKfp(tmp_path) as server:
        assert submit(run, server, *nothing).returncode == 0
        look, looks = server.PipelineService_ListPipelines, []

        def late(given):
            looks.append(given)
            return {} if len(looks) == 1 else look(given)

        monkeypatch.setattr(server, "PipelineService_ListPipelines", late)
        done = submit(run, server, *nothing)
        assert done.returncode == 0 and ": reused" in done.stdout, done.stderr
        assert len(server.pipelines) == len(server.versions) == 1


def test_steps_that_read_each_other_by_uri_want_a_pipeline_root(run, server):
    sharded = ("--set", "data.shards=2", "--set", "student.model=/absent")
    assert "data.shards: above 1, steps read KFP's own bucket" in submit(run, server, *sharded).stdout
    done = submit(run, server, *sharded, "--pipeline-root", "s3://bucket/steps")
    assert done.returncode == 0 and "data.shards" not in done.stdout
    assert list(server.runs.values())[-1]["runtime_config"]["pipeline_root"] == "s3://bucket/steps"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output.uri=/tmp/out", "output.uri: /tmp/out would be lost"),
        ("resources.gpus_per_node=3", "training.global_batch_size: 2 rows do not divide over 3 ranks"),
    ],
)
def test_what_would_fail_or_be_lost_on_a_cluster_is_refused(run, server, override, message):
    before = len(server.runs)
    refused = submit(run, server, "--set", override)
    assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1
    assert len(server.runs) == before


def readme_commands():
    """The five commands of the README's section "On a cluster", as lists of arguments."""
    section = (ROOT / "README.md").read_text().split("## On a cluster")[1]
    block = section.split("```")[1].replace("REGISTRY", "registry.example.org").replace("DIGEST", "0" * 64)
    return [shlex.split(line, comments=True) for line in block.strip().splitlines()]


def test_the_commands_of_the_readme_name_what_is_there(tmp_path):
    """The first three need Docker and a cluster; what they read is tested in test_manifests.py. The fourth runs."""
    commands = readme_commands()
    assert [command[0] for command in commands] == ["docker", "kubectl", "kubectl", "xtoken", "kfp"]
    for command in commands[:4]:
        paths = [argument for argument in command if argument.startswith(("manifests/", "pipelines/"))]
        assert paths and all((ROOT / path).exists() for path in paths)
    _, *arguments, _, compiled = commands[3]
    assert compiled == "run.yaml"
    done = call("pipelines", *arguments, "-o", tmp_path / compiled)
    assert (done.returncode, done.stderr) == (0, "")
    assert "image: registry.example.org/xtoken@sha256:000" in (tmp_path / compiled).read_text()


def test_kfp_runs_the_compiled_file_with_overrides(run, cluster):
    """The README's last command, on a small spec."""
    _, *arguments = readme_commands()[4]
    given = [
        {"run.yaml": run / "compiled.yaml", "overrides=training.max_steps=200": "overrides=training.max_steps=1"}.get(a, a)
        for a in arguments
    ]
    code, printed = kfp(cluster, *given)
    assert code == 0, printed
    assert cluster.last_run()["state"] == "SUCCEEDED"
    assert yaml.safe_load((run / "out" / "spec.yaml").read_text())["training"]["max_steps"] == 1


def test_an_override_that_the_dag_cannot_follow_fails_before_any_gpu(run, cluster):
    assert kfp(cluster, "run", "submit", "-e", "by-hand", "-f", run / "compiled.yaml", "overrides=data.shards=2")[0] == 0
    state = cluster.last_run()
    assert state["state"] == "FAILED"
    assert [task["display_name"] for task in state["run_details"]["task_details"]] == ["resolve"]
    assert "data.shards: 2 contradicts the compiled pipeline" in (cluster.folder / state["run_id"] / "log").read_text()


def test_unknown_parameters_are_refused(run, server):
    code, printed = kfp(server, "run", "submit", "-e", "by-hand", "-f", run / "compiled.yaml", "overide=training.max_steps=1")
    assert code and "unknown pipeline parameters: overide" in printed


def test_a_missing_experiment_is_refused(server):
    client = Cluster(server.url).client()
    with pytest.raises(kfp_server_api.ApiException, match="Experiment nowhere not found"):
        client.run_pipeline("nowhere", "a run", pipeline_id="p", version_id="v")
    assert kfp(server, "experiment", "get", "nowhere")[0]


def test_tokens_are_passed_on(run, tmp_path):
    with FakeKfp(tmp_path, token="secret") as server:
        refused = submit(run, server)
        assert refused.returncode == 2
        assert refused.stderr == f"{server.url}: 401 Unauthorized: User identity is empty in the request header.\n"
        assert submit(run, server, KF_PIPELINES_TOKEN="secret").returncode == 0


def test_an_endpoint_that_is_not_there_is_one_line(run):
    gone = call("pipelines", "submit", run / "spec.yaml", "--endpoint", "http://127.0.0.1:9")
    assert gone.returncode == 2
    assert gone.stderr.startswith("http://127.0.0.1:9: cannot be reached") and gone.stderr.count("\n") == 1


def test_the_server_is_strict(server):
    """What the stand-in is for: it refuses what the published API does not know."""
    client = Cluster(server.url).client()
    with pytest.raises(kfp_server_api.ApiException, match="Additional properties|not a pipeline"):
        client.pipelines.pipeline_service_create_pipeline(pipeline={"display_name": "p", "displayname": "p"})
    with pytest.raises(kfp_server_api.ApiException, match="not a experiment"):
        client.experiments.experiment_service_create_experiment(experiment={"display_name": 7})
