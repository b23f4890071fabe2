"""Each component by itself, on its command line."""

import importlib
import json

import fsspec
import pytest
import yaml
from click.testing import CliRunner

from components.cli import command
from tests.support.cli import call as shell
from tests.support.tiny import tiny_run
from xtoken_core.errors import ERROR_FILE, InputError, left_error
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.evaluations import read_evaluations

NAMES = (
    "resolve", "overlap", "projection", "prepare", "distill", "evaluate", "report", "audit", "trial", "standing", "verdict"
)  # fmt: skip


def component(name):
    return getattr(importlib.import_module(f"components.{name}"), name)


def call(name, *arguments):
    return CliRunner().invoke(command(component(name)), [str(a) for a in arguments], standalone_mode=False, catch_exceptions=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with tiny models, texts and spec.yaml."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "spec.yaml").write_text(yaml.safe_dump(tiny_run(folder)))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_of_every_input_and_output(name):
    result = CliRunner().invoke(command(component(name)), ["--help"])
    assert result.exit_code == 0
    inputs = component(name).component_spec.inputs or {}
    outputs = [output for output, kind in (component(name).component_spec.outputs or {}).items() if "Artifact" in str(kind.type)]
    for option in (*inputs, *outputs):
        assert "inspect._empty" not in result.output
        assert f"--{option.replace('_', '-')} " in result.output.replace("/", " ").replace("--no", "")


@pytest.mark.slow
def test_each_step_runs_by_itself(run):
    """From a spec to a report, one command after the other, the way a person would."""
    spec = ("--spec", run / "spec.yaml")
    audit = call("overlap", *spec, "--report", run / "audit.json")
    assert audit.exception is None, audit.output
    modes = json.loads(audit.output.splitlines()[-1])["modes"]
    assert modes["other"] == "p_kl"
    assert call("prepare", *spec, "--rows", run / "rows").exception is None
    built = call("projection", *spec, "--matrices", run / "w", "--rows", run / "rows")
    assert built.exception is None and "once joined by the rows" in built.output
    training = ("--rows", run / "rows", "--projections", run / "w", "--modes", json.dumps(modes), "--run", run / "trained")
    assert call("distill", *spec, *training).exception is None
    result = call("evaluate", *spec, "--group", "student-after", "--run", run / "trained", "--results", run / "after")
    assert result.exception is None, result.output
    assert [found.bits_per_byte.total > 0 for found in read_evaluations(run / "after")] == [True, True]
    pages = ("--page", run / "page.html", "--summary", run / "summary.md", "--metrics", run / "metrics.json")
    made = ("--overlap", run / "audit.json", "--rows", run / "rows", "--run", run / "trained", "--projections", run / "w")
    assert call("report", *spec, *pages, *made, "--evaluated-after", run / "after").exception is None
    assert "bits_per_byte_student_after_last" in json.loads((run / "metrics.json").read_text())
    assert {path.name for path in (run / "out").iterdir()} == {
        "report.html", "run.json", "spec.yaml", "published.json", "student", "logs", "projections", "serving"
    }  # fmt: skip
    assert DistillationSpec.from_yaml(run / "out" / "spec.yaml") == DistillationSpec.from_yaml(run / "spec.yaml")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--spec", "absent.yaml", "--report", "r"], "absent.yaml: cannot read the spec: No such file or directory"),
        (["--report", "r"], "python -m components.overlap: Missing option '--spec'."),
        (
            ["--spec", "SPEC", "--report", "r", "--set", "training.max_step=1"],
            "SPEC: training.max_step: no such field; did you mean max_steps?",
        ),
    ],
)
def test_bad_options_are_one_line_and_exit_2(run, tmp_path, arguments, line):
    result = shell("components.overlap", *[run / "spec.yaml" if a == "SPEC" else a for a in arguments])
    assert (result.returncode, result.stderr) == (2, line.replace("SPEC", str(run / "spec.yaml"), 1) + "\n")


def test_bad_input_inside_a_step_is_one_line_and_exit_2(run, tmp_path):
    """The line goes to stderr, and to the file that a program which runs steps asks for."""
    wrong = ("--set", "teachers.other.projection=null")
    error = tmp_path / "error"
    arguments = ("--spec", run / "spec.yaml", *wrong, "--report", tmp_path / "r")
    result = shell("components.overlap", *arguments, **{ERROR_FILE: str(error)})
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "no projection, so it must have the student's vocabulary" in result.stderr
    left = left_error(error)
    assert isinstance(left, InputError) and f"{left}\n" == result.stderr
    assert not (tmp_path / "r").exists()


def test_a_full_disk_is_one_line_and_exit_2(run, tmp_path):
    result = shell("components.overlap", "--spec", run / "spec.yaml", "--report", "/dev/full")
    assert (result.returncode, result.stderr) == (2, "a working file: No space left on device\n")


def test_an_output_at_a_uri_takes_the_place_of_nothing_that_its_step_did_not_write(run, tmp_path):
    fs, place = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/rows"
    audit = ("overlap", "--spec", run / "spec.yaml", "--report")
    prepare = ("prepare", "--spec", run / "spec.yaml", "--rows")
    fs.pipe(f"/{tmp_path.name}/rows/thesis.tex", b"mine")
    refused = call(*prepare, place)
    assert isinstance(refused.exception, InputError) and "holds other things" in str(refused.exception)
    assert fs.find(f"/{tmp_path.name}") == [f"/{tmp_path.name}/rows/thesis.tex"]
    fs.rm(f"/{tmp_path.name}/rows/thesis.tex")
    for _ in range(2):
        assert call(*prepare, place).exception is None
    fs.pipe(f"/{tmp_path.name}/rows/train/notes.txt", b"mine")
    assert "holds 'train/notes.txt', which no run put there" in str(call(*prepare, place).exception)
    for _ in range(2):  # a file is written over, as by any command
        assert call(*audit, f"memory://{tmp_path.name}/audit.json").exception is None
