"""A sweep as an OptimizationJob: held to the types of Trainer's main branch, and one trial trained as its controller would start it."""

import json

import jsonschema
import pytest
import yaml

from tests.conformance.test_manifests import MANIFESTS, SPECS
from tests.conformance.test_trainjob import cluster  # noqa: F401 - a fixture
from tests.support.cli import call
from tests.support.schemas import check_resource
from tests.support.tiny import tiny_run
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.errors import InputError
from xtoken_core.report.run import FORMAT, Run
from xtoken_core.results.workflow import Prepared
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.optimization import OBJECTIVE, optimization_job
from xtoken_core.workflow.vocabularies import write_projections


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder, which stands for a volume that every host mounts, with a spec, and the published record of a run that prepared rows and W."""
    folder = tmp_path_factory.mktemp("run")
    resources = {"gpus_per_node": 0, "queue": "team-a", "pvc": [{"name": "shared", "mount_path": str(folder)}]}
    values = tiny_run(folder, teachers=1)
    values |= {"resources": resources, "loss": values["loss"] | {"dynamic_scaling": False}}
    spec = DistillationSpec.from_text(json.dumps(values))
    (folder / "spec.yaml").write_text(yaml.safe_dump(json.loads(spec.to_json())))
    prepared = Prepared(rows=[str(folder / "rows")], projections=str(folder / "w"))
    finished = Run(format=FORMAT, spec=spec.model_dump(mode="json"), settings=json.loads(spec.to_json()), prepared=prepared)
    (folder / "before").mkdir()
    finished.save(folder / "before" / "run.json")
    return folder, spec, finished


def check_job(job: dict) -> None:
    check_resource(job, "optimizationjobs")
    template = job["spec"]["trainJobTemplate"]
    about = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": f"{job['metadata']['name']}-trial-64"},
    }
    check_resource(about | {"spec": template["spec"]}, "trainjobs")


def test_the_command_writes_a_grid_of_trials(run):
    folder, spec, _ = run
    given = ["--over", "loss.kd_weight=0.5,1", "--over", "training.learning_rate=1e-3,1e-4,1e-5", "--rows-of", folder / "before"]
    done = call("pipelines", "sweep", folder / "spec.yaml", *given, "-o", folder / "job.yaml")
    assert done.returncode == 0 and "kubectl create -f" in done.stdout, done.stderr
    job = yaml.safe_load((folder / "job.yaml").read_text())
    check_job(job)
    assert job["spec"]["objectives"] == [{"metric": OBJECTIVE, "direction": "Minimize"}] and job["spec"]["numTrials"] == 6
    choices = {p["name"]: p["searchSpace"]["categorical"]["choices"] for p in job["spec"]["parameters"]}
    assert choices == {"loss_kd_weight": ["0.5", "1"], "training_learning_rate": ["0.001", "0.0001", "1e-05"]}
    assert job["spec"]["trainJobTemplate"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"


def test_the_shipped_example_is_valid_and_what_would_be_written_now():
    example = yaml.safe_load((MANIFESTS / "examples" / "optimization-job.yaml").read_text())
    check_job(example)
    image = example["spec"]["trainJobTemplate"]["spec"]["trainer"]["image"]
    changes = ["loss.dynamic_scaling=false", f"resources.image={image}"]
    spec = DistillationSpec.from_yaml(SPECS / "llama-1b-from-qwen.yaml", changes)
    prepared = Prepared(rows=["s3://steps/prepare/rows"], projections="s3://steps/projections/matrices")
    assert optimization_job(spec, {"loss.kd_weight": [0.5, 1, 2]}, Run.collect(spec, prepared=prepared)) == example


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda job: job.update(parallelTrials=7), "parallelTrials cannot exceed numTrials"),
        (lambda job: job["parameters"][0].update(searchSpace={"uniform": {"min": "0", "max": "1"}}), "Grid search requires"),
        (lambda job: job["trainJobTemplate"].update(metadata={"name": "x"}), "cannot be set in a template"),
        (lambda job: job.update(numTrial=1), "numTrial"),
    ],
)
def test_a_job_that_breaks_a_rule_is_caught(run, change, message):
    _, spec, finished = run
    job = optimization_job(spec, {"loss.kd_weight": [0.5, 1]}, finished)
    change(job["spec"])
    with pytest.raises(jsonschema.ValidationError, match=message):
        check_job(job)


@pytest.mark.parametrize(
    ("section", "prepared", "values", "message"),
    [
        ({"data": {"validation": []}}, None, [1], "data.validation: missing"),
        ({"data": {"max_length": 16}}, None, [1], "--rows-of: .*: its prepare step read another spec"),
        ({}, Prepared(), [1], "--rows-of: .*: does not tell where its rows lie"),
        ({}, Prepared(rows=["/elsewhere"]), [1], "--rows-of: /elsewhere: not every host can reach it"),
        ({}, None, [[0, 1]], "--over: loss.kd_weight: .*: a trial takes plain values"),
    ],
)
def test_what_trials_cannot_do_is_refused(run, section, prepared, values, message):
    _, spec, finished = run
    given = json.loads(spec.to_json())
    changed = DistillationSpec.from_text(json.dumps(given | {name: given[name] | fields for name, fields in section.items()}))
    found = finished if prepared is None else finished.model_copy(update={"prepared": prepared})
    with pytest.raises(InputError, match=message) as caught:
        optimization_job(changed, {"loss.kd_weight": values}, found)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_trial_trains_with_its_values_and_tells_the_objective(run, cluster):  # noqa: F811
    """Started as the controller does: its values as variables, upper case, after KUBEFLOW_TRAINER_OPT_."""
    folder, spec, finished = run
    for split in ("train", "validation"):
        prepare_rows(spec, folder / "rows" / split, split)
    write_projections(spec, folder / "w")
    job = optimization_job(spec, {"loss.kd_weight": [0.5, 1], "training.seed": [1, 2]}, finished)
    trial = {"metadata": {"name": "trial"}, "spec": job["spec"]["trainJobTemplate"]["spec"]}
    injected = {"KUBEFLOW_TRAINER_OPT_LOSS_KD_WEIGHT": "0.5", "KUBEFLOW_TRAINER_OPT_TRAINING_SEED": "2"}
    trial["spec"]["trainer"]["env"] += [{"name": name, "value": value} for name, value in injected.items()]
    cluster.start(trial)
    assert cluster.hosts["trial"][0].wait(timeout=300) == 0, (cluster.folder / "trial-0" / "log").read_text()[-2000:]
    assert (folder / "out" / "trials" / "kd_weight-0.5-seed-2" / "last" / "config.json").exists()
    told = {metric["name"]: metric["value"] for metric in cluster.progress["trial"]["trainerStatus"]["metrics"]}
    log = [
        json.loads(line) for line in (folder / "out" / "trials" / "kd_weight-0.5-seed-2" / "log.jsonl").read_text().splitlines()
    ]
    assert float(told[OBJECTIVE]) == pytest.approx(
        [line for line in log if "validation_bits_per_byte" in line][-1]["validation_bits_per_byte"]
    )
