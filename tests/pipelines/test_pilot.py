"""A pilot as tasks: what compiles to what, and whole runs of it on this machine, killed and resumed."""

import json
import os
import re
import signal
import sys
from unittest import mock

import pytest
import yaml

from pipelines import api
from pipelines.__main__ import main
from pipelines.compiling import compile_spec, documents
from pipelines.local import for_this_machine
from pipelines.warm import fork
from tests.support.cli import call
from tests.support.tiny import texts, tiny_run
from xtoken_core.errors import InputError
from xtoken_core.results.pilot import Pilot
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.resolve import resolve
from xtoken_core.workflow.shape import shape

CANDIDATES = [{"name": "same", "teachers": ["same"]}, {"name": "other", "teachers": ["other"], "set": ["loss.mode=h_kl"]}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with tiny models, texts and spec.yaml."""
    folder = tmp_path_factory.mktemp("pilot")
    spec = tiny_run(folder)
    held_out = [json.dumps({"text": text[:300]}) for text in texts(12)[4:]]
    (folder / "held-out.jsonl").write_text("\n".join(held_out) + "\n")
    spec["teachers"][1]["scores"] = {"top_k": 16}
    spec["training"] |= {"max_steps": 24, "log_steps": 1}
    spec["pilot"] = {"candidates": CANDIDATES, "budget": 0.6, "then": "best"}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder


def tasks(run, *overrides):
    return documents(compile_spec(DistillationSpec.from_yaml(run / "spec.yaml", overrides)))[0]["root"]["dag"]["tasks"]


ALWAYS = {"resolve", "overlap", "projections", "prepare", "evaluate-student-before", "evaluate-teachers", "score-same", "report"}
PILOT = {"audit", "trial-1-ce", "trial-1-same", "trial-1-other", "standing-1", "trial-2-ce", "trial-2-0", "verdict"}


@pytest.mark.slow
def test_the_tasks_of_a_pilot(run):
    unrolled = tasks(run, "pilot.then=stop")
    assert set(unrolled) == ALWAYS | PILOT
    assert set(tasks(run)) == ALWAYS | PILOT | {"distill", "evaluate-student-after"}
    for name in PILOT - {"audit", "standing-1", "verdict"}:
        assert "audit" in unrolled[name]["dependentTasks"]
    assert (
        "standing-1" in unrolled["trial-2-0"]["dependentTasks"] and "standing-1" not in unrolled["trial-2-ce"]["dependentTasks"]
    )
    assert tasks(run)["distill"]["inputs"]["parameters"]["candidate"]["taskOutputParameter"]["producerTask"] == "verdict"
    assert not {"pilot", "audit"} & set(tasks(run, "pilot=null"))


def test_a_short_run_hears_of_its_own_candidate_only_so_that_others_leave_it_in_the_cache(run):
    def given(unrolled, name):
        return unrolled[name]["inputs"]

    before, after = tasks(run), tasks(run, "pilot.candidates.1.set=[loss.mode=gold]")
    assert given(before, "trial-1-same") == given(after, "trial-1-same")
    assert given(before, "trial-1-other") != given(after, "trial-1-other")
    here = for_this_machine(compile_spec(DistillationSpec.from_yaml(run / "spec.yaml")))["root"]["dag"]["tasks"]
    assert {name for name, task in here.items() if not task["cachingOptions"]} == {"resolve", "report"}


def test_another_pilot_than_the_compiled_one_is_refused(run):
    spec = DistillationSpec.from_yaml(run / "spec.yaml")
    with pytest.raises(InputError, match="^pilot: .* contradicts the compiled pipeline"):
        resolve(spec.to_json(), "pilot.budget=0.5", json.dumps(shape(spec)))


def test_a_sweep_has_none(run):
    refused = call("pipelines", "sweep", run / "spec.yaml", "--over", "loss.temperature=1,2")
    assert (refused.returncode, refused.stderr) == (2, "pilot: a sweep has none; its candidates are the sweep's values\n")


def unchanged(output):
    return {found[1] for found in re.finditer(r"\] ([\w-]+): unchanged", output)}


def _killed_after_two(arguments):
    """The command line, which gets SIGKILL when two short runs of the first rung are done and the next task has begun."""
    write, told = sys.stdout.write, []

    def writes(text):
        if text.strip() and len(set(re.findall(r"\] (trial-1-\w+): done", "".join(told)))) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        told.append(text)
        return write(text)

    with mock.patch.object(sys.stdout, "write", writes), mock.patch("sys.argv", ["pipelines", *arguments]):
        main()


@pytest.mark.slow
def test_a_pilot_that_is_killed_goes_on_and_the_main_run_follows_it(run):
    """SIGKILL after some short runs of the first rung; the next run repeats none of them. Then without the main run, from the cache."""
    command = ["run", run / "spec.yaml", "--runs", run / "runs"]
    started, output = fork(_killed_after_two, list(map(str, command)))
    done = set(re.findall(r"\] (trial-1-\w+): done", output.read()))
    started.join()
    assert started.exitcode == -signal.SIGKILL and len(done) == 2

    whole = call("pipelines", *command)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert done <= unchanged(whole.stdout) and "trial-2-0: done" in whole.stdout
    result = api.load(str(run / "out"))
    pilot = result.run.pilot
    chosen = {"ce": set(), "same": {"same"}, "other": {"other"}}[pilot.chosen]
    assert set(result.run.heard) == set(result.run.summary.modes) == chosen and result.run.summary.steps == 24
    assert [(t.rung, t.candidate, t.steps) for t in pilot.trials if t.candidate == "ce"] == [(1, "ce", 2), (2, "ce", 4)]
    assert f"as the pilot chose: {pilot.chosen}" in whole.stdout and pilot.reason in str(result.verdict)
    card = (run / "out" / "student" / "best" / "README.md").read_text()
    assert ("distilled from" in card) == bool(chosen) and ("trained on cross-entropy only" in card) != bool(chosen)
    assert Pilot.read(run / "out" / "pilot.json") == pilot
    _stopped(run, command, pilot)


def _stopped(run, command, pilot):
    """The same pilot, and nothing after it: every short run is there already."""
    only = call("pipelines", *command, "--set", "pilot.then=stop", "--set", f"output.uri={run}/only")
    assert only.returncode == 0, only.stdout + only.stderr
    assert PILOT - {"audit", "verdict"} <= unchanged(only.stdout)
    result = api.load(str(run / "only"))
    assert {task.name for task in result.run.tasks if task.seconds is None} == {"report"}
    assert {task.name for task in result.run.tasks if task.status == "cached"} == unchanged(only.stdout)
    assert (
        result.run.pilot == pilot.model_copy(update={"next": result.run.pilot.next}) and result.verdict.headline == pilot.reason
    )
    assert (pilot.next, result.verdict.sentences[0]) == ("", f"Next: {result.run.pilot.next}")
    assert pilot.reason in only.stdout and f"{run}/only/pilot.json" in only.stdout
    assert {path.name for path in (run / "only").iterdir()} == {
        "report.html", "run.json", "spec.yaml", "published.json", "projections", "pilot.json"
    }  # fmt: skip
    page = (run / "only" / "report.html").read_text()
    assert 'id="pilot"' in page and "Gain over cross-entropy only" in page and 'id="student"' not in page
