"""Specs as pipelines: what compiles to what, what a step depends on, and runs on this machine."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines import compiling
from pipelines.cluster import WRITABLE
from pipelines.compiling import compile_spec, documents
from pipelines.local import for_this_machine
from tests.support.cli import call
from tests.support.processes import ended, forked, left_in_shared_memory
from tests.support.tiny import tiny_model, tiny_run
from xtoken_core.errors import InputError
from xtoken_core.results.vocabulary import ProjectionStats
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.resolve import resolve
from xtoken_core.workflow.shape import CHECKPOINTS, WIRING, shape
from xtoken_core.workflow.subjects import groups, subjects
from xtoken_core.workflow.views import View, view

SPECS = sorted(compiling.SPECS.glob("*.yaml"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with tiny models, texts and spec.yaml (one teacher, nothing evaluated)."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "spec.yaml").write_text(yaml.safe_dump(tiny_run(folder, teachers=1)))
    return folder


def spec_of(*overrides, **sections):
    base = {
        "name": "run",
        "student": {"model": "small"},
        "teachers": [{"id": "big", "model": "big", "projection": {}}, {"id": "same", "model": "same"}],
        "data": {"train": ["train.txt"], "validation": ["held-out.txt"]},
        "output": {"uri": "out"},
    }
    return DistillationSpec.from_text(json.dumps(base | sections), overrides)


def tasks(spec):
    return documents(compile_spec(spec))[0]["root"]["dag"]["tasks"]


def producer(task, name):
    """The task that another one's input artifact comes from."""
    return task["inputs"]["artifacts"][name]["taskOutputArtifact"]["producerTask"]


def test_the_dag_is_the_same_for_any_number_of_teachers():
    many = [{"id": f"t{n}", "model": "big", "projection": {}} for n in range(20)]
    unrolled = tasks(spec_of("evaluation.ce_baseline=true"))
    assert set(unrolled) == set(tasks(spec_of("evaluation.ce_baseline=true", teachers=many))) == {
        "resolve", "overlap", "projections", "prepare", "distill", "distill-baseline", "evaluate-teachers",
        "evaluate-student-before", "evaluate-student-after", "evaluate-baseline", "report",
    }  # fmt: skip
    assert set(unrolled["distill"]["dependentTasks"]) == {"overlap", "prepare", "projections", "resolve"}
    assert producer(unrolled["distill"], "projections") == "projections"
    assert producer(unrolled["report"], "evaluated_teachers") == "evaluate-teachers"
    assert producer(unrolled["evaluate-baseline"], "run") == "distill-baseline"
    assert "projections" not in tasks(spec_of(teachers=[{"id": "same", "model": "same"}]))
    assert producer(unrolled["projections"], "rows") == "prepare"  # the rows join cells
    assert "more_rows" not in unrolled["projections"]["inputs"]["parameters"]  # one shard needs no credentials of the store
    sharded = tasks(spec_of("data.shards=2"))["projections"]
    assert sharded["dependentTasks"] == ["prepare-0", "prepare-1", "resolve"] and producer(sharded, "rows") == "prepare-0"


def test_every_parameter_and_every_output_of_resolve_is_described():
    pipeline = documents(compile_spec(spec_of()))[0]
    parameters = pipeline["root"]["inputDefinitions"]["parameters"]
    outputs = pipeline["components"]["comp-resolve"]["outputDefinitions"]["parameters"]
    assert set(parameters) == {"spec", "overrides"} and outputs
    assert all(about.get("description") for about in (*parameters.values(), *outputs.values()))


def test_scores_are_a_task_for_each_teacher_and_shard_and_training_waits_for_them():
    teachers = [{"id": "a", "model": "a", "scores": {}}, {"id": "b", "model": "b", "scores": {"uri": "s3://b/scores"}}]
    found = tasks(spec_of(teachers=teachers))
    assert "score-a" in found and "score-b" not in found
    assert found["score-a"]["retryPolicy"]["maxRetryCount"] == 2  # it goes on where a pre-empted one has stopped
    assert found["score-a"]["dependentTasks"] == ["prepare", "resolve"] and "score-a" in found["distill"]["dependentTasks"]
    crossing = tasks(spec_of(teachers=[{"id": "a", "model": "a", "projection": {}, "scores": {}}], loss={"mode": "partition_kl"}))
    assert producer(crossing["score-a"], "projections") == "projections"  # scores are of the cells of W
    sharded = tasks(spec_of("data.shards=2", teachers=teachers[:1]))
    assert {"score-a-0", "score-a-1"} <= set(sharded) and sharded["score-a-1"]["dependentTasks"] == ["prepare-1", "resolve"]


def test_shards_are_tasks_and_several_hosts_a_launcher():
    sharded = tasks(spec_of("data.shards=3"))
    assert {name for name in sharded if name.startswith("prepare")} == {"prepare-0", "prepare-1", "prepare-2"}
    assert {"prepare-0", "prepare-1", "prepare-2"} <= set(sharded["distill"]["dependentTasks"])
    read = [{"id": "same", "model": "same", "scores": {}}]
    pilot = {"candidates": [{"name": "all"}], "then": "best"}
    pipeline, platform = documents(compile_spec(spec_of("resources.nodes=2", teachers=read, pilot=pilot)))
    given = pipeline["root"]["dag"]["tasks"]["distill"]["inputs"]["parameters"]
    assert {"scores", "candidate", "rows", "resources"} <= given.keys()
    launcher = pipeline["deploymentSpec"]["executors"]["exec-distill"]["container"]
    assert (
        launcher["args"][-1] == "launch" and "accelerator" not in launcher["resources"]
    )  # its GPUs are those of the job's hosts
    config = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-distill"]
    assert mounted(config) == WRITABLE
    assert {field["name"]: field["fieldPath"] for field in config["fieldPathAsEnv"]} == {
        "KFP_RUN_ID": "metadata.labels['pipeline/runid']",
        "KFP_RUN_NAME": "metadata.annotations['pipelines.kubeflow.org/run_name']",
    }


def test_the_report_is_told_the_edges():
    unrolled = tasks(spec_of())
    told = unrolled["report"]["inputs"]["parameters"]["tasks"]["runtimeValue"]["constant"]
    assert [task["name"] for task in told][:2] == ["resolve", "overlap"]
    for task in told:
        assert set(task["after"]) <= set(unrolled[task["name"]].get("dependentTasks", []))
    assert {task["name"] for task in told} == set(unrolled)


def test_nothing_is_evaluated_without_a_measure():
    assert groups(spec_of(data={"train": ["t"]})) == []
    asked = spec_of("evaluation.tasks=[arc_easy]", data={"train": ["t"]})
    assert groups(asked) == ["teachers", "student-before", "student-after"]
    assert [subject.key for group in groups(asked) for subject in subjects(asked, group)] == [
        "teacher-big", "teacher-same", "student_before", "student_after_last"
    ]  # fmt: skip
    assert not [name for name in tasks(spec_of("evaluation.bits_per_byte=false")) if name.startswith("evaluate")]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_committed_compiled_forms_are_fresh(path):
    committed = (compiling.COMPILED / path.name).read_text()
    fresh = compile_spec(DistillationSpec.from_yaml(path))
    assert documents(fresh) == documents(committed), "stale: run `make compile`"


def test_a_stale_compiled_form_is_found_and_mended(run, tmp_path, monkeypatch):
    for name in ("SPECS", "COMPILED"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(compiling, name, tmp_path / name)
    spec = tmp_path / "SPECS" / "tiny.yaml"
    shutil.copy(run / "spec.yaml", spec)
    assert compiling.compile_all() == [tmp_path / "COMPILED" / "tiny.yaml"]
    assert compiling.stale() == []
    spec.write_text(spec.read_text().replace("max_steps: 2", "max_steps: 3"))
    assert compiling.stale() == [spec]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_what_is_compiled_parses_as_kfp_reads_it(path):
    """Every message is one of KFP's, no field unknown: the pipeline, and each task's Kubernetes settings."""
    pipeline, platform = yaml.safe_load_all(compile_spec(DistillationSpec.from_yaml(path)))
    json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert configs.keys() == pipeline["deploymentSpec"]["executors"].keys()
    for config in configs.values():
        json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())


RESOURCES = {
    "image": "example.org/xtoken@sha256:" + "0" * 64,
    "image_pull_policy": "Always",
    "gpus_per_node": 4,
    "gpu_type": "amd.com/gpu",
    "cpu": "12",
    "memory": "100Gi",
    "shm": "20Gi",
    "retries": 3,
    "node_selector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}],
    "secrets": [{"secret": "s3", "key": "id", "env": "AWS_ACCESS_KEY_ID"}],
    "pvc": [{"name": "models", "mount_path": "/models"}],
    "evaluation_cpu": "3",
    "evaluation_memory": "20Gi",
    "queue": "team-a",
    "priority_class": "low",
    "labels": {"team": "nlp"},
    "annotations": {"sidecar.istio.io/inject": "false"},
    "image_pull_secrets": ["registry"],
    "node_affinity": [{"key": "gpu", "values": ["h100"]}],
    "active_deadline_seconds": 3600,
    "ttl_seconds_after_finished": 7200,
    "env": {"HF_HOME": "/models/huggingface"},
}


def test_gpu_steps_get_what_resources_say():
    pipeline, platform = documents(compile_spec(spec_of(resources=RESOURCES)))
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, task in pipeline["root"]["dag"]["tasks"].items():
        container = pipeline["deploymentSpec"]["executors"][f"exec-{name}"]["container"]
        config = configs[f"exec-{name}"]
        gpu = name == "distill" or name.startswith("evaluate")
        assert container["image"] == RESOURCES["image"]
        assert config["imagePullPolicy"] == "Always"
        assert config["secretAsEnv"][0]["keyToEnv"][0] == {"secretKey": "id", "envVar": "AWS_ACCESS_KEY_ID"}
        assert config["pvcMount"][0]["mountPath"] == "/models"
        labels, about = config["podMetadata"]["labels"], config["podMetadata"]["annotations"]
        assert labels["kueue.x-k8s.io/queue-name"] == "team-a" and labels["kueue.x-k8s.io/priority-class"] == "low"
        assert labels["team"] == "nlp" and about == RESOURCES["annotations"]
        assert config["imagePullSecret"][0]["secretName"] == "registry" and config["activeDeadlineSeconds"] == "3600"
        assert config["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        assert {"name": "HF_HOME", "value": "/models/huggingface"} in container["env"]
        size = ("12", "100Gi") if name in ("prepare", "distill") else ("3", "20Gi") if gpu else ("1", "4Gi")
        asked = container["resources"]
        assert (asked["resourceCpuRequest"], asked["resourceMemoryRequest"]) == size
        assert (asked["resourceCpuLimit"], asked["resourceMemoryLimit"]) == size
        assert ("accelerator" in asked) == gpu
        assert mounted(config).items() >= WRITABLE.items()  # what a read-only root leaves to write to
        of_gpu_nodes = ("nodeSelector", "tolerations", "nodeAffinity")
        assert {field in config for field in of_gpu_nodes} == {gpu}
        tried_once = name in ("resolve", "overlap", "prepare", "projections")
        assert task.get("retryPolicy", {}).get("maxRetryCount") == (None if tried_once else 3)
        if gpu:
            count = "4" if name == "distill" else "1"  # evaluations take a model each, all at a time
            assert container["resources"]["accelerator"] == {
                "type": "amd.com/gpu", "resourceType": "amd.com/gpu", "count": count, "resourceCount": count
            }  # fmt: skip
            shared = {"volumeName": "shared-memory", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "20Gi"}
            assert shared in config["emptyDirMounts"]
            assert config["nodeSelector"]["labels"] == {"pool": "gpu"}
            assert config["tolerations"][0]["key"] == "gpu"
            assert config["nodeAffinity"][0]["matchExpressions"] == [{"key": "gpu", "operator": "In", "values": ["h100"]}]
    assert platform["platforms"]["kubernetes"]["pipelineConfig"] == {"resourceTtlOnCompletion": 7200}


def mounted(config: dict) -> dict[str, str]:
    """The empty folders of a task's pod, by path."""
    return {mount["mountPath"]: mount["volumeName"] for mount in config["emptyDirMounts"]}


def test_a_claim_takes_the_place_of_an_empty_folder():
    """Two volumes at one path are refused by Kubernetes."""
    resources = {"pvc": [{"name": "home", "mount_path": "/home/xtoken/"}]}
    configs = documents(compile_spec(spec_of(resources=resources)))[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert [set(mounted(config)) - {"/dev/shm"} for config in configs.values()] == [{"/tmp"}] * len(configs)


def test_evaluations_ask_for_the_memory_that_resolve_tells():
    """By the sizes of the models, which only a run knows; what the spec names is compiled in, see above."""
    scored = [{"id": "big", "model": "big"}, {"id": "same", "model": "same", "scores": {"top_k": 4}}]
    pipeline = documents(compile_spec(spec_of("evaluation.ce_baseline=true", teachers=scored)))[0]
    asked = {}
    for name, task in pipeline["root"]["dag"]["tasks"].items():
        resources = pipeline["deploymentSpec"]["executors"][f"exec-{name}"]["container"]["resources"]
        assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"]
        if found := re.fullmatch(r"\{\{\$.inputs.parameters\['(.*)'\]\}\}", resources["resourceMemoryLimit"]):
            asked[name] = task["inputs"]["parameters"][found[1]]["taskOutputParameter"]
            assert "memoryLimit" not in resources  # the older field, which takes numbers only
    assert {output["producerTask"] for output in asked.values()} == {"resolve"}
    assert {name: output["outputParameterKey"] for name, output in asked.items()} == {
        "evaluate-teachers": "teacher_memory", "score-same": "teacher_memory", "evaluate-student-before": "student_memory",
        "evaluate-student-after": "student_memory", "evaluate-baseline": "student_memory",
    }  # fmt: skip


def test_a_spec_too_long_for_a_steps_argument_is_refused():
    listed = [f"s3://bucket/train/part-{number:05}.parquet" for number in range(1500)]
    with pytest.raises(
        InputError, match=r"^spec: 6\d,\d{3} characters as JSON; a step can be given 40,000: name files by wildcards"
    ):
        compile_spec(spec_of(data={"train": listed}))
    read = [{"field": "data.train", "version": "0123456789abcdef", "uri": uri} for uri in listed[:900]]
    executed = len(json.dumps({"spec": spec_of(data={"train": listed[:900]}).to_json(), "inputs": read}))
    assert executed < 2**17  # of the report, whose inputs are the longest


def test_training_is_cached_here_and_never_on_a_cluster():
    compiled = compile_spec(spec_of("evaluation.ce_baseline=true"))
    cached = {name: bool(task["cachingOptions"]) for name, task in documents(compiled)[0]["root"]["dag"]["tasks"].items()}
    assert {name for name, on in cached.items() if not on} == {"resolve", "distill", "distill-baseline", "report"}
    here = for_this_machine(compiled)["root"]["dag"]["tasks"]
    assert {name for name, task in here.items() if not task["cachingOptions"]} == {"resolve", "report"}


STEPS = ("overlap", "projections", "prepare", "distill", "baseline", "evaluate_student", "evaluate_teachers")


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("training.max_steps=7", {"distill", "baseline"}),
        ("loss.temperature=2", {"distill", "evaluate_student"}),
        ("loss.mode=gold", {"distill", "overlap", "evaluate_student"}),
        ("loss.dynamic_scaling=false", {"distill"}),
        ("teachers.same.weight=0.5", {"distill"}),
        ("teachers.big.projection.top_k=2", {"distill", "projections"}),
        ("data.max_length=128", {"prepare", "distill", "baseline", "evaluate_student", "evaluate_teachers"}),
        ("student.model=other", {"overlap", "projections", "prepare", "distill", "baseline", "evaluate_student"}),
        ("student={model: other, tokenizer: small}", {"distill", "baseline", "evaluate_student"}),
        ("student.keep_layers=2", {"distill", "baseline", "evaluate_student"}),
        ("training.precision=fp32", {"distill", "baseline", "evaluate_student", "evaluate_teachers"}),
        ("evaluation.limit=3", {"evaluate_student", "evaluate_teachers"}),
        ("evaluation.ce_baseline=true", set()),
        ("output.uri=elsewhere", set()),
        ("resources.memory=1Gi", set()),
        ("name=other", set()),
    ],
)
def test_a_step_sees_only_what_it_reads(override, changed):
    def views(spec):
        return {step: view(spec, step) for step in STEPS}

    before, after = views(spec_of()), views(spec_of(override))
    assert {step for step in STEPS if before[step] != after[step]} == changed


def test_views_follow_the_files_that_a_step_reads(run):
    spec = DistillationSpec.from_yaml(run / "spec.yaml")
    before = resolve(spec.to_json())
    assert View.from_text(before.distill).training == spec.training
    document = run / "train" / "0.txt"
    text = document.read_text()
    document.write_text(text + " More.")
    after = resolve(spec.to_json())
    document.write_text(text)
    assert {name for name, old, new in zip(before._fields, before, after) if old != new} == {"prepare", "inputs"}


def test_training_follows_the_scores_that_another_run_has_stored(run):
    stored = run / "stored-scores"
    stored.mkdir()
    (stored / "part-00000.safetensors").write_bytes(b"once")
    same = tiny_model(run / "same", 400, 2)
    spec = DistillationSpec.from_yaml(run / "spec.yaml", [f"teachers=[{{id: same, model: {same}, scores: {{uri: {stored}}}}}]"])
    before = resolve(spec.to_json())
    (stored / "part-00000.safetensors").write_bytes(b"and again")
    after = resolve(spec.to_json())
    assert {name for name, old, new in zip(before._fields, before, after) if old != new} == {"distill", "trial", "inputs"}
    shutil.rmtree(stored)
    with pytest.raises(InputError, match=f"^teachers.same.scores.uri: {stored}: no such file"):
        resolve(spec.to_json())


SCORED = "teachers=[{id: same, model: RUN/same, scores: {top_k: 4}}, {id: other, model: RUN/other, projection: {}}]"
SHARED = {"overlap", "projections", "prepare", "score", "evaluate_teachers"}


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("student={model: RUN/second, tokenizer: RUN/student}", SHARED),
        ("student.keep_layers=1", SHARED),
        ("training.seed=7", SHARED),
        ("training.learning_rate=1e-4", SHARED),
        ("loss.dynamic_scaling=0.5", SHARED),
        ("name=other", SHARED),
        ("student={model: RUN/second}", {"evaluate_teachers"}),
        ("teachers.1.projection.top_k=2", SHARED - {"projections"}),
        ("teachers.1.mode=gold", SHARED - {"overlap"}),
        ("loss.temperature=2", SHARED - {"score"}),
        ("data.max_length=32", SHARED - {"prepare", "score", "evaluate_teachers"} | {"score"}),
    ],
)
def test_students_of_one_tokenizer_share_what_does_not_depend_on_them(run, override, same):
    """All that KFP's key has of a task: its inputs, which are views of the first task and outputs of shared ones, and its container."""
    tiny_model(run / "same", 400, 2)
    tiny_model(run / "second", 400, 9)

    def of(*changes):
        return DistillationSpec.from_yaml(run / "spec.yaml", [change.replace("RUN", str(run)) for change in (SCORED, *changes)])

    first, second = of(), of(override)
    views = [resolve(spec.to_json())._asdict() for spec in (first, second)]
    assert {step for step in SHARED if views[0][step] == views[1][step]} == same
    keys = [
        (document["root"]["dag"]["tasks"]["score-same"], document["deploymentSpec"]["executors"]["exec-score-same"])
        for document in (documents(compile_spec(spec))[0] for spec in (first, second))
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("resources.memory=1Gi", 'resources.memory: "1Gi" contradicts the compiled pipeline, which has "64Gi" built in'),
        ("data.shards=2", "data.shards: 2 contradicts"),
        ("resources.nodes=2", "resources.nodes: 2 contradicts"),
        ("evaluation.ce_baseline=true", "evaluation.ce_baseline: true contradicts"),
        ("teachers.other.id=another", 'teachers: ["another"] contradicts'),
        ("teachers.other.projection=null", "teachers.other.projection"),
        ("training.max_steps=x", "spec: training.max_steps"),
        ("training.max_steps='", "overrides: No closing quotation"),
        ("teachers.other.model=/absent", "teachers.other.model: /absent: no such file or folder"),
        ("student.model=/absent.gguf", "student.model: /absent.gguf: no such file or folder"),
        ("data.train=[/absent.txt]", "data.train: /absent.txt: no such file"),
        ("evaluation.texts=[pyproject.toml]", "pyproject.toml: not a .txt, .jsonl or .parquet file"),
        ("output.uri=/proc/none/out", "/proc/none/out: "),
    ],
)
def test_overrides_at_submission_are_checked_before_anything_runs(run, overrides, message):
    spec = DistillationSpec.from_yaml(run / "spec.yaml")
    with pytest.raises(InputError) as caught:
        resolve(spec.to_json(), overrides, json.dumps(shape(spec)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_compiled_pipeline_of_an_older_version_is_refused(run):
    spec = DistillationSpec.from_yaml(run / "spec.yaml")
    older = {name: value for name, value in shape(spec).items() if name != "wiring"}
    with pytest.raises(
        InputError, match=f"^compiled pipeline: of version 1, but the steps of this image are of version {WIRING}; "
    ):
        resolve(spec.to_json(), "", json.dumps(older))


def test_rows_divide_over_the_gpus_of_a_cluster_and_not_of_this_machine(run, monkeypatch):
    spec = DistillationSpec.from_yaml(run / "spec.yaml", ["resources.gpus_per_node=3"]).to_json()
    with pytest.raises(InputError, match="training.global_batch_size: 2 rows do not divide over 3 ranks"):
        resolve(spec)
    monkeypatch.setenv(CHECKPOINTS, "/somewhere")
    assert resolve(spec).checkpoints == "/somewhere"


@pytest.mark.parametrize("mount", ["/elsewhere", None])
def test_checkpoints_lie_beside_an_output_that_outlives_its_pod(run, mount):
    claim = {"resources": {"pvc": [{"name": "work", "mount_path": mount or str(run)}]}}
    spec = yaml.safe_load((run / "spec.yaml").read_text()) | claim
    assert resolve(json.dumps(spec)).checkpoints == ("" if mount else f"{run}/out.checkpoints")


def test_overrides_that_a_compiled_pipeline_can_follow_are_taken(run):
    spec = DistillationSpec.from_yaml(run / "spec.yaml")
    overrides = shlex.join(["training.max_steps=9", f"output.uri={run}/else where"])
    views = resolve(spec.to_json(), overrides, json.dumps(shape(spec)))
    assert View.from_text(views.distill).training.max_steps == 9
    assert DistillationSpec.from_text(views.report).output.uri == f"{run}/else where"


pipelines = partial(call, "pipelines")


def test_the_entry_point(run):
    """In a process of its own, once: what the other tests call in theirs."""
    command = [sys.executable, "-m", "pipelines", "validate", run / "spec.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "valid" in done.stdout
    wrong = subprocess.run([*command, "--set", "training.max_step=3"], capture_output=True, text=True, timeout=300)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        f"{run}/spec.yaml: training.max_step: no such field; did you mean max_steps?\n",
    )


def test_validate_and_compile(run, tmp_path):
    valid = pipelines("validate", run / "spec.yaml", "--set", "training.max_steps=3")
    assert valid.returncode == 0 and "valid" in valid.stdout
    assert pipelines("compile", run / "spec.yaml", "-o", tmp_path / "deep" / "p.yaml").returncode == 0
    assert documents((tmp_path / "deep" / "p.yaml").read_text())[0]["pipelineInfo"]["name"] == "tiny"


def test_compile_tells_what_a_cluster_would_lose(run):
    ready = ("--set", f"resources.image={RESOURCES['image']}", "--set", "output.uri=s3://bucket/out")
    told = pipelines("compile", run / "spec.yaml", *ready)
    assert told.returncode == 0 and told.stderr.startswith("training.save_steps: not set; ") and told.stderr.count("\n") == 1
    for enough in ("training.save_steps=1", "resources.gpus_per_node=0", "resources.retries=0"):
        assert pipelines("compile", run / "spec.yaml", *ready, "--set", enough).stderr == ""
    local = pipelines("compile", run / "spec.yaml", *ready[:2], "--set", "training.save_steps=1")
    assert local.returncode == 0 and local.stderr.startswith(f"output.uri: {run}/out would be lost with the pod")
    uneven = pipelines("compile", run / "spec.yaml", *ready, "--set", "resources.nodes=3")
    assert uneven.returncode == 2 and uneven.stderr.startswith("training.global_batch_size: 2 rows do not divide over 3 ranks")


@pytest.mark.parametrize("verb", ["validate", "compile", "run", "submit"])
def test_bad_input_is_one_line_and_exit_2(verb, run):
    bad = pipelines(verb, run / "spec.yaml", "--set", "training.max_step=3")
    assert (bad.returncode, bad.stderr) == (2, f"{run}/spec.yaml: training.max_step: no such field; did you mean max_steps?\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("SPEC", "-o", "."), "Is a directory"),
        (("SPEC", "--check"), "--check: is about the specs of pipelines/specs"),
        (("--set", "training.max_steps=3", "--check"), "need a SPEC"),
        (("-o", "p.yaml"), "need a SPEC"),
    ],
)
def test_compile_refuses_what_it_would_ignore_or_cannot_write(run, arguments, line):
    bad = pipelines("compile", *(run / "spec.yaml" if argument == "SPEC" else argument for argument in arguments))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert line in bad.stderr.splitlines()[-1] and "Traceback" not in bad.stderr


def steps(output, ending):
    """Tasks of the progress lines (`[ 2/6] overlap: ...`) that hold `ending`."""
    return {found[1] for line in output.splitlines() if ending in line and (found := re.match(r"\[ *\d+/\d+\] ([\w-]+)", line))}


def reported(run):
    """Tasks that the run's report marks as taken from the cache; all have a duration but the report itself."""
    told = json.loads((run / "out" / "run.json").read_text())["tasks"]
    assert {task["name"] for task in told if task.get("seconds") is None} == {"report"}
    return {task["name"] for task in told if task["status"] == "cached"}


@pytest.mark.slow
def test_a_run_reuses_what_has_not_changed(run):
    """Everything the first time; then nothing but what publishes; then training only, of another student with the first one's tokenizer."""
    changes = ("evaluation.bits_per_byte=false", "data.shards=2", "loss.mode=partition_kl", "teachers.other.scores={top_k: 4}")
    command = ("run", run / "spec.yaml", "--runs", run / "runs", *(part for change in changes for part in ("--set", change)))
    shared, scores = {"overlap", "prepare-0", "prepare-1", "projections"}, {"score-other-0", "score-other-1"}
    first = pipelines(*command)
    assert first.returncode == 0, first.stdout + first.stderr
    assert reported(run) == set()
    assert first.stdout.count(": done after") == 9 and "unchanged" not in first.stdout
    assert (run / "out" / "student" / "last" / "config.json").exists() and (run / "out" / "report.html").exists()

    joined = ProjectionStats.read(run / "out" / "projections" / "other.json").joined
    assert joined is not None and joined.left < joined.cells and joined.apart_left < joined.apart

    second = pipelines(*command)
    assert steps(second.stdout, "unchanged") == reported(run) == shared | scores | {"distill"}
    prepared = json.loads((run / "out" / "run.json").read_text())["prepare"]["train"]
    assert prepared["documents"] == 4 and len(prepared["corpora"]) == 1  # of both shards
    other = f"student={{model: {tiny_model(run / 'another', 400, 8)}, tokenizer: {run / 'student'}}}"
    third = pipelines(*command, "--set", "training.max_steps=3", "--set", other)
    assert steps(third.stdout, "unchanged") == reported(run) == shared | scores
    assert len((run / "out" / "logs" / "log.jsonl").read_text().splitlines()) > 2


@pytest.mark.slow
def test_bad_input_inside_a_run_is_its_last_line(run, tmp_path):
    """A vocabulary that does not fit shows when the tokenizers are first loaded; nothing is published."""
    same = ("--set", "teachers.other.projection=null", "--set", f"output.uri={tmp_path}/out")
    bad = pipelines("run", run / "spec.yaml", "--runs", tmp_path / "runs", *same)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1 and "must have the student's vocabulary" in bad.stderr
    assert not (tmp_path / "out").exists()


def ended_by(end, command, runs):
    """Starts a run in a session of its own, as a terminal does, whose training stands still, and ends it by a signal in the middle.

    Returns its exit code and what it said on stderr; holds it to having left no process.
    """
    known = set(runs.glob("checkpoints/*/checkpoint-*"))
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.support.standing", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which shells ignore in the background
    )
    try:
        while set(runs.glob("checkpoints/*/checkpoint-*")) <= known and started.poll() is None:
            time.sleep(0.1)
        processes = psutil.Process(started.pid).children(recursive=True)
        end(started.pid)
        _, errors = started.communicate(timeout=300)
    finally:
        started.kill()
    assert len(processes) >= 3  # the student and its teacher among them
    assert ended(processes)
    return started.returncode, errors


@pytest.mark.slow
def test_a_run_that_is_ended_leaves_nothing_and_goes_on(run, tmp_path):
    """In the middle of training, with its teacher running: by SIGTERM, by Ctrl-C; the last one goes on from the checkpoint."""
    runs = tmp_path / "runs"
    command = ["run", run / "spec.yaml", "--runs", runs, "--set", f"output.uri={tmp_path}/out"]
    command += ["--set", "evaluation.bits_per_byte=false", "--set", "training.max_steps=15", "--set", "training.save_steps=5"]
    command += ["--set", "loss.mode=partition_kl"]  # whose W follows the rows
    before = set(os.listdir("/dev/shm"))
    told = "tiny: ended by SIGTERM; the next run goes on from what was done\n"
    assert ended_by(lambda pid: os.kill(pid, signal.SIGTERM), command, runs) == (143, told)
    told = "\ntiny: interrupted; the same command goes on: finished steps are kept, training from its last checkpoint, of every 5 steps\n"
    assert ended_by(lambda pid: os.killpg(pid, signal.SIGINT), command, runs) == (130, told)
    assert not left_in_shared_memory(before)
    assert not (tmp_path / "out").exists()

    resumed = pipelines(*command)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert steps(resumed.stdout, "unchanged") == {"overlap", "prepare", "projections"}
    assert json.loads((tmp_path / "out" / "logs" / "summary.json").read_text())["resumed_from"] == 10


@pytest.mark.slow
def test_a_step_that_breaks_is_a_failed_run(run, tmp_path):
    """Killed from outside, as for want of memory: no matter of the spec. The log is named, the exit code is 1."""
    known, runs = set(forked(os.getpid())), tmp_path / "runs"
    long = [
        "--set",
        "training.max_steps=100000",
        "--set",
        "training.save_steps=1",
    ]  # it does not end by itself before it is killed

    def kill_the_training() -> None:
        deadline = time.monotonic() + 200
        while not any(runs.glob("checkpoints/*/checkpoint-*")):
            assert time.monotonic() < deadline, "no training has started"
            time.sleep(0.05)
        next(process for process in forked(os.getpid()) if process not in known).kill()  # its teachers have started after it

    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill_the_training)
        done = pipelines("run", run / "spec.yaml", "--runs", runs, *long, "--set", "evaluation.bits_per_byte=false")
        killed.result()
    assert done.returncode == 1 and done.stderr.startswith("distill: the step failed")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
