"""Sweeps: what they share, what they refuse, and one on this machine."""

import json

import pytest
import yaml
from click.testing import CliRunner

from pipelines.__main__ import cli
from pipelines.cautions import size_caution
from pipelines.compiling import compile_sweep, documents
from pipelines.sweeps import variants
from tests.support.tiny import tiny_run
from xtoken_core.errors import InputError
from xtoken_core.report.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with tiny models, texts and spec.yaml, with a twin."""
    folder = tmp_path_factory.mktemp("run")
    spec = tiny_run(folder, teachers=1)
    spec |= {"evaluation": {"ce_baseline": True}, "loss": spec["loss"] | {"dynamic_scaling": False}}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder


def tasks(run, *over):
    compiled = documents(compile_sweep(variants(run / "spec.yaml", [], over)))[0]
    return compiled["root"]["dag"]["tasks"]


ONCE = {"resolve", "overlap", "projections", "prepare", "evaluate-teachers", "compare"}
TWIN = {"distill-baseline", "evaluate-baseline", "evaluate-student-before"}
EACH = ("resolve", "distill", "evaluate-student-after", "report")


@pytest.mark.parametrize(
    ("over", "labels", "twins"),
    [
        (("loss.kd_weight=0.5,1",), ("kd-weight-0-5", "kd-weight-1"), TWIN),
        (("training.learning_rate=1e-3,1e-4",), ("learning-rate-0-001", "learning-rate-0-0001"), {"evaluate-student-before"}),
    ],
)
def test_everything_but_training_is_there_once(run, over, labels, twins):
    """The twin too, where what differs does not concern it."""
    own = (*EACH, *sorted(TWIN - twins))
    unrolled = tasks(run, *over)
    assert set(unrolled) == ONCE | twins | {f"{task}-{label}" for task in own for label in labels}
    reports = {f"report-{label}" for label in labels}
    assert reports <= set(unrolled["compare"]["dependentTasks"])
    told = unrolled[f"report-{labels[1]}"]["inputs"]["parameters"]["tasks"]["runtimeValue"]["constant"]
    names = [task["name"] for task in told]
    assert len(names) == len(set(names)) and set(names) == {*(ONCE - {"compare"}), *TWIN, *EACH}


@pytest.mark.parametrize(
    ("over", "line"),
    [
        (["data.max_length=32,64"], "--over: data.max_length: changes what the prepare step reads"),
        (["data.shards=1,2"], "--over: data.shards: changes the tasks of the workflow"),
        (["loss.kd_weight=1"], "--over: 1 combinations; a sweep has 2 to 64"),
        (["loss.kd_weight"], "--over: loss.kd_weight: KEY=VALUE,VALUE,... is wanted"),
        (["loss.kd_weight=-1,1"], "loss.kd_weight"),
        (["loss.kd_weight=1,1"], "--over: kd-weight-1: stands for two of its combinations"),
    ],
)
def test_what_cannot_be_shared_is_refused(run, over, line):
    with pytest.raises(InputError) as caught:
        variants(run / "spec.yaml", [], over)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_values_that_are_lists_and_several_fields():
    from pipelines.sweeps import _axis

    assert _axis("student.keep_layers=[0, 1],2") == ("student.keep_layers", [[0, 1], 2])


def test_a_workflow_that_kubernetes_would_not_store_is_told():
    assert size_caution("x" * 2**20) == (
        "compiled pipeline: 1.0 MiB; Kubernetes stores a workflow of at most 1.5 MiB, the states of its tasks included; have fewer "
        "variants or shards"
    )
    assert size_caution("x" * 1000) is None


@pytest.mark.slow
def test_a_sweep_on_this_machine(run, tmp_path):
    """Two trainings, two reports, one page; each report knows when its tasks ran, the shared ones too."""
    arguments = ["sweep", run / "spec.yaml", "--over", "loss.kd_weight=0.5,1", "--runs", tmp_path / "runs"]
    done = CliRunner().invoke(cli, [*map(str, arguments), "--page", str(tmp_path / "compare.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "compare.html").read_text()
    assert "kd_weight" in page and "2 runs side by side" in page
    for label, weight in (("kd-weight-0-5", 0.5), ("kd-weight-1", 1.0)):
        finished = Run.published(str(run / "out" / label))
        assert finished.spec["loss"]["kd_weight"] == weight and len(finished.results) == 6
        assert {task.name for task in finished.tasks if task.seconds is None} == {"report"}
        assert not [task for task in finished.tasks if task.status == "cached"]
    log = json.loads((run / "out" / "kd-weight-1" / "logs" / "summary.json").read_text())
    assert log["steps"] == 2
