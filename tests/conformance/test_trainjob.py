"""Training on several hosts: the launcher against a stand-in for Kubernetes (see kubernetes_server.py) whose hosts are
processes of this machine, each a torchrun of its own."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import jsonschema
import kubernetes
import pytest
import torch
import yaml

from tests.conformance.test_manifests import rights
from tests.support.kubernetes_server import FakeKubernetes
from tests.support.schemas import check_resource
from tests.support.tiny import tiny_run
from tests.support.training_run import losses
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec, ResourcesSpec
from xtoken_core.training.distill import distill
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.workflow import trainjob
from xtoken_core.workflow.scoring import score_teacher
from xtoken_core.workflow.trainjob_manifest import GROUP, VERSION, Reads, manifest
from xtoken_core.workflow.vocabularies import matrices, write_projections

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with all that training reads, which stands for a volume that every host mounts."""
    folder = tmp_path_factory.mktemp("run")
    values = tiny_run(folder)
    values["teachers"][1]["scores"] = {"top_k": 8}
    spec = DistillationSpec.from_text(json.dumps(values))
    for split in ("train", "validation"):
        prepare_rows(spec, folder / "rows" / split, split)
    write_projections(spec, folder / "w")
    score_teacher(spec, "same", folder / "rows", folder / "scores")
    return folder, spec


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    with FakeKubernetes(tmp_path) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))  # which the client reads when it is imported
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig))
        yield cluster


def resources(folder, **more) -> str:
    return ResourcesSpec(nodes=2, gpus_per_node=0, pvc=({"name": "shared", "mount_path": str(folder)},), **more).model_dump_json()


def launch(run, out, candidate="", **changes) -> None:
    folder, spec = run
    given = {"rows": [str(folder / "rows")], "modes": {"other": "p_kl"}, "projections": str(folder / "w")}
    given |= {"scores": [str(folder / "scores")]} | changes
    trainjob.launch(spec.to_json(), resources(folder), Reads(**given), str(out), candidate=candidate)


def test_two_hosts_train_one_student(run, cluster, capfd):
    """The candidate that a pilot chose, of a live teacher and one whose scores every host reads: as one process trains it."""
    folder, spec = run
    candidate = '{"name": "both"}'
    launch(run, folder / "trained", candidate=candidate)
    told = capfd.readouterr().out
    assert "as the pilot chose: both" in told
    scores = {"same": (folder / "scores",)}
    distill(spec, TrainingInputs((folder / "rows",), {"other": "p_kl"}, matrices(spec, folder / "w"), scores), folder / "alone")
    torch.testing.assert_close(
        torch.tensor(losses(folder / "trained")), torch.tensor(losses(folder / "alone")), rtol=1e-4, atol=1e-5
    )
    assert "created, 2 hosts" in told and "step 2/2" in told and told.rstrip().endswith("complete")
    assert re.search(r"^xtoken-distill-\w+: 100 % done", told, re.M)  # by the job's status, which transformers' callback tells
    for state in cluster.states:
        check_resource(state, "trainjobs")
    assert json.loads((folder / "trained" / "summary.json").read_text())["steps"] == 2
    assert (folder / "trained" / "last" / "config.json").exists()
    job = next(iter(cluster.jobs.values()))
    assert job["spec"]["trainer"]["numNodes"] == 2

    launch(run, folder / "trained", candidate=candidate)  # a launcher that was pre-empted finds its job by its name
    assert "is there already; followed" in capfd.readouterr().out
    assert len(cluster.jobs) == 1


def test_a_job_that_fails_fails_its_launcher_with_the_log(run, cluster, capfd):
    folder, _ = run
    with pytest.raises(trainjob.TrainJobError, match="jobset failed"):
        launch(run, folder / "failed", rows=[str(folder / "absent")])
    assert f"{folder}/absent: no such file or folder" in capfd.readouterr().out
    launched = set(cluster.jobs)
    again = copy.deepcopy(next(iter(cluster.jobs.values())))
    again["spec"]["trainer"]["command"] = ["false"]  # sooner than the same job would fail
    with pytest.raises(trainjob.TrainJobError):  # tried again, it is made anew
        trainjob.run_job(again)
    assert cluster.asked == rights()  # every right that manifests/trainer gives is used, and no other
    assert set(cluster.jobs) == launched and "created again" in capfd.readouterr().out
    assert not (folder / "failed" / "last").exists()


def test_a_launcher_that_is_cancelled_deletes_its_job(run, cluster):
    folder, spec = run
    (folder / "spec.yaml").write_text(yaml.safe_dump(json.loads(spec.to_json())))
    arguments = ["--spec", folder / "spec.yaml", "--rows", json.dumps([str(folder / "rows")]), "--run", folder / "cancelled"]
    arguments += [
        "--scores",
        json.dumps([str(folder / "scores")]),
        "--resources",
        resources(folder),
        "--projections",
        folder / "w",
        "--modes",
        '{"other": "p_kl"}',
    ]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "components.launch", *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    while [len(hosts) for hosts in list(cluster.hosts.values())] != [2]:
        assert launcher.poll() is None
        time.sleep(0.1)
    processes = next(iter(cluster.hosts.values()))
    launcher.send_signal(signal.SIGTERM)
    told, _ = launcher.communicate(timeout=300)
    assert cluster.asked <= rights()  # the least that manifests/trainer gives the launcher
    assert launcher.returncode == 143 and "deleted, since this step was cancelled" in told
    assert cluster.jobs == {} and all(process.poll() is not None for process in processes)


def test_a_hiccup_of_the_api_ends_no_launcher(cluster, capfd, monkeypatch):
    job = manifest("xtoken-distill-1", "{}", ResourcesSpec(nodes=2, gpus_per_node=0), ["sh", "-c", "echo told; sleep 1"])
    cluster.hiccups = 2
    trainjob.run_job(job)
    told = capfd.readouterr().out
    assert told.count("xtoken-distill-1: apiserver not ready; looking again") == 2 and "told" in told.splitlines()

    monkeypatch.setattr(trainjob, "PATIENCE", 3)
    job["metadata"]["name"], cluster.hiccups = "xtoken-distill-2", 3
    with pytest.raises(trainjob.TrainJobError, match="xtoken-distill-2: left running, since the cluster does not answer"):
        trainjob.run_job(job)
    assert "xtoken-distill-2" in cluster.jobs  # the step's next try follows it


def test_a_job_that_is_being_deleted_is_made_again(cluster, capfd, monkeypatch):
    """As the next try of a step finds it whose launcher was cancelled: to follow it is to fail when it is gone."""
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.05)
    place = {"group": GROUP, "version": VERSION, "namespace": "default", "plural": trainjob.PLURAL}
    job = manifest("xtoken-distill-1", "{}", ResourcesSpec(nodes=2, gpus_per_node=0), ["true"])
    for lingers in (3, 1000):
        cluster.lingers = 0
        trainjob.run_job(job)
        cluster.lingers = lingers
        kubernetes.client.CustomObjectsApi().delete_namespaced_custom_object(**place, name="xtoken-distill-1")
        if lingers == 3:
            trainjob.run_job(job)
            assert (
                "waiting until the job before is gone\nxtoken-distill-1: had been deleted; created again"
                in capfd.readouterr().out
            )
    monkeypatch.setattr(trainjob, "PATIENCE", 3)
    with pytest.raises(trainjob.TrainJobError, match="xtoken-distill-1: the one before has been deleted and does not go"):
        trainjob.run_job(job)


def test_a_job_that_another_has_deleted_is_told(cluster):
    place = {"group": GROUP, "version": VERSION, "namespace": "default", "plural": trainjob.PLURAL}
    job = manifest("xtoken-distill-1", "{}", ResourcesSpec(nodes=2, gpus_per_node=0), ["sleep", "100"])

    def delete() -> None:
        while len(cluster.hosts.get("xtoken-distill-1", [])) < 2:
            time.sleep(0.05)
        kubernetes.client.CustomObjectsApi().delete_namespaced_custom_object(**place, name="xtoken-distill-1")

    deleter = threading.Thread(target=delete)
    deleter.start()
    with pytest.raises(trainjob.TrainJobError, match="xtoken-distill-1: deleted by another"):
        trainjob.run_job(job)
    deleter.join()


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({}, ""),
        ({"progressPercentage": 0}, "0 % done"),
        (
            {
                "progressPercentage": 42,
                "estimatedRemainingSeconds": 3785,
                "metrics": [
                    {"name": n, "value": v} for n, v in (("loss", "1.23456"), ("tokens_per_second", "17834.5"), ("x", "1"))
                ],
            },
            "42 % done, 63 min 05 s left, loss 1.235, tokens_per_second 17,834",
        ),
        ({"metrics": [{"name": "loss", "value": "NaN?"}]}, "loss NaN?"),
    ],
)
def test_progress_is_told_in_a_line(status, told):
    """Of any status that the CRD allows, as another trainer's callback may write it."""
    job = manifest("xtoken-distill-1", "{}", ResourcesSpec(nodes=2), ["true"])
    stamped = {"trainerStatus": status | {"lastUpdatedTime": "2026-01-01T00:00:00Z"}}
    check_resource(job | {"status": stamped}, "trainjobs")
    assert trainjob.progress(job | {"status": stamped}) == told


def test_the_namespace_is_that_of_the_context(cluster, monkeypatch):
    given = yaml.safe_load(cluster.kubeconfig.read_text())
    given["contexts"][0]["context"]["namespace"] = "team-a"
    cluster.kubeconfig.write_text(yaml.safe_dump(given))
    assert trainjob._load_config(kubernetes) == "team-a"


def test_what_not_every_host_reaches_is_refused(run):
    folder, spec = run
    with pytest.raises(InputError, match="resources.nodes: several hosts cannot all reach /elsewhere/rows"):
        trainjob.launch(spec.to_json(), resources(folder), Reads(["/elsewhere/rows"]), str(folder / "x"))


def test_the_job_is_one_of_the_published_crd():
    given = ResourcesSpec(
        image="example.org/xtoken@sha256:" + "0" * 64,
        nodes=3,
        gpus_per_node=8,
        shm="32Gi",
        node_selector={"pool": "gpu"},
        tolerations=({"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"},),
        secrets=({"secret": "s3", "key": "id", "env": "AWS_ACCESS_KEY_ID"},),
        pvc=({"name": "models", "mount_path": "/models"},),
        queue="team-a",
        priority_class="low",
        labels={"team": "nlp"},
        annotations={"sidecar.istio.io/inject": "false"},
        image_pull_secrets=("registry",),
        env={"HF_HOME": "/models/huggingface"},
        node_affinity=({"key": "gpu", "values": ["h100"]}, {"key": "spot", "operator": "DoesNotExist"}),
        active_deadline_seconds=3600,
    )
    job = manifest("xtoken-distill-1", "{}", given, ["true"])
    check_resource(job, "trainjobs")
    assert job["spec"]["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "8"
    assert {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "id"}}} in job["spec"]["trainer"][
        "env"
    ]
    pod = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]
    assert pod["spec"]["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    assert pod["metadata"] == {"labels": {"team": "nlp"}, "annotations": {"sidecar.istio.io/inject": "false"}}
    terms = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert terms[0]["matchExpressions"][1] == {"key": "spot", "operator": "DoesNotExist"}
    assert job["spec"]["activeDeadlineSeconds"] == 3600 and pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert {"name": "HF_HOME", "value": "/models/huggingface"} in job["spec"]["trainer"]["env"]
    job["spec"]["trainer"]["nodes"] = 3
    with pytest.raises(Exception, match="nodes"):  # what the check is worth: a field that Trainer does not know
        check_resource(job, "trainjobs")


def test_the_mlflow_run_of_the_launcher_is_that_of_the_hosts(run, monkeypatch):
    """Its id and its server; credentials come from secrets, which the spec names, and never lie in a job."""
    folder, spec = run
    given = {"MLFLOW_RUN_ID": "r1", "MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_TRACKING_TOKEN": "t0ken"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    made = []
    monkeypatch.setattr(trainjob, "run_job", made.append)
    secrets = ({"secret": "mlflow", "key": "uri", "env": "MLFLOW_TRACKING_URI"},)
    trainjob.launch(spec.to_json(), resources(folder, secrets=secrets), Reads([str(folder / "rows")]), str(folder / "x"))
    check_resource(made[0], "trainjobs")
    env = {entry["name"]: entry.get("value") for entry in made[0]["spec"]["trainer"]["env"]}
    assert env["MLFLOW_RUN_ID"] == "r1" and env["MLFLOW_TRACKING_URI"] is None and "t0ken" not in json.dumps(made[0])
    assert len(env) == len(made[0]["spec"]["trainer"]["env"])


@pytest.mark.parametrize(
    ("name", "processes", "message"),
    [
        ("1-xtoken", 8, "the resource: metadata.name must match RFC 1035"),
        ("x" * 64, 8, "the resource: metadata.name must be no more than 63 characters"),
        ("xtoken", 0, r"\.spec\.trainer\.numProcPerNode: numProcPerNode must be greater than or equal to 1"),
    ],
)
def test_a_job_that_breaks_a_rule_of_the_crd_is_caught(name, processes, message):
    """The rules in CEL, of which the types know nothing: the launcher's own job keeps them, see above."""
    job = manifest(name, "{}", ResourcesSpec(nodes=2), ["true"])
    job["spec"]["trainer"]["numProcPerNode"] = processes
    with pytest.raises(jsonschema.ValidationError, match=message):
        check_resource(job, "trainjobs")


def test_a_job_names_the_run_that_made_it(run, monkeypatch):
    """By the label that finds it, `kubectl get trainjobs -l pipeline/runid=ID`, and the run's name; on its own pod KFP writes the same."""
    folder, spec = run
    made = []
    monkeypatch.setattr(trainjob, "run_job", made.append)
    inputs = (spec.to_json(), resources(folder), Reads([str(folder / "rows")]), str(folder / "x"))
    trainjob.launch(*inputs)
    monkeypatch.setenv("KFP_RUN_ID", "0a1b2c3d-0000-4000-8000-000000000000")
    monkeypatch.setenv("KFP_RUN_NAME", "the first run")
    trainjob.launch(*inputs)
    outside, inside = (job["metadata"] for job in made)
    assert outside["name"] == inside["name"] and "pipeline/runid" not in outside["labels"]  # another run finds the job again
    assert inside["labels"] == outside["labels"] | {"pipeline/runid": "0a1b2c3d-0000-4000-8000-000000000000"}
    assert inside["annotations"] == {"pipelines.kubeflow.org/run_name": "the first run"}
    check_resource(made[1], "trainjobs")
