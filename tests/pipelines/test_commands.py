"""The commands around a run: explain, schema, status, completion; and a finished run from Python, on a folder that stands for one."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from click.shell_completion import BashComplete
from huggingface_hub import constants
from jsonschema import Draft202012Validator
from transformers import AutoModelForCausalLM

from pipelines.__main__ import cli
from pipelines.progress import Progress
from pipelines.status import Status, statuses
from tests.support.cli import call
from tests.support.hub_server import Hub
from tests.support.report_sample import sample_run
from tests.support.tiny import tiny_run
from xtoken_core.report.card import model_card
from xtoken_core.spec import DistillationSpec


def test_a_field_is_explained_and_a_section_with_its_fields():
    told = call("pipelines", "explain", "loss.temperature").stdout
    assert told.startswith("loss.temperature\n") and "default: 1.0" in told
    section = call("pipelines", "explain", "teachers").stdout
    assert "teachers[].weight" in section and "\nloss." not in section


def test_a_field_that_is_not_there_is_one_line_with_what_may_be_meant():
    wrong = call("pipelines", "explain", "training.max_step")
    assert wrong.returncode == 2 and wrong.stderr.startswith("training.max_step: no such field; did you mean training.max_steps")
    assert wrong.stderr.count("\n") == 1


def test_the_schema_holds_the_specs(tmp_path):
    done = call("pipelines", "schema", "-o", tmp_path / "deep" / "schema.json")
    assert done.returncode == 0
    schema = json.loads((tmp_path / "deep" / "schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    assert {"student", "teachers", "data", "output"} <= set(schema["required"])
    assert call("pipelines", "schema", "-o", "/proc/none/x").returncode == 2


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("held_out", ["", "held-out.jsonl"])
def test_a_first_spec_is_valid_and_names_its_schema(tmp_path, kind, held_out):
    spec = tmp_path / "spec.yaml"
    teachers = ("--teacher", "qwen=Qwen/Qwen3-4B", "--teacher", "a/b: c")
    flags = ("--kind", kind, "--student", "org/small", *teachers, "--train", "text/*.jsonl", "--validation", held_out)
    done = call("pipelines", "init", spec, *flags)
    assert done.returncode == 0, done.stderr
    parsed = DistillationSpec.from_yaml(spec)
    assert [(t.id, t.model) for t in parsed.teachers] == [("qwen", "Qwen/Qwen3-4B"), ("b-c", "a/b: c")]
    assert parsed.evaluation.ce_baseline == bool(held_out)
    named = spec.read_text().splitlines()[0].rpartition("=")[2]
    assert json.loads((tmp_path / named).read_text())["title"] == "DistillationSpec"
    again = call("pipelines", "init", spec, *flags)
    assert (again.returncode, again.stderr) == (2, f"{spec}: is there already\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(shell):
    assert "_XTOKEN_COMPLETE=" in call("pipelines", "completion", shell).stdout
    assert call("pipelines", "completion", "csh").returncode == 2


@pytest.mark.parametrize(
    ("words", "begun", "meant"),
    [
        ([], "comp", ["compare", "compile", "completion"]),
        (["explain"], "training.learn", ["training.learning_rate"]),
        (["explain"], "teachers.wei", ["teachers.weight"]),
        (["run", "x.yaml", "--set"], "training.learn", ["training.learning_rate="]),
        (["run", "x.yaml", "--set"], "teachers.wei", []),
    ],
)
def test_commands_and_fields_are_completed(words, begun, meant):
    assert [found.value for found in BashComplete(cli, {}, "xtoken", "_").get_completions(words, begun)] == meant


def test_bash_completes(tmp_path):
    program = tmp_path / "xtoken"
    program.write_text(f"#!{sys.executable}\nfrom pipelines.__main__ import main\nmain()\n")
    program.chmod(0o755)
    script = f"""{call("pipelines", "completion", "bash").stdout}
        COMP_WORDS=(xtoken stat) COMP_CWORD=1
        _xtoken_completion xtoken
        echo "${{COMPREPLY[@]}}"
    """
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[2])}
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=os.environ | path)
    assert (told.stdout, told.stderr) == ("status\n", "")


def test_a_first_spec_with_a_pilot(tmp_path):
    flags = ("--student", "org/small", "--teacher", "org/large", "--train", "text/*.jsonl", "--pilot")
    done = call("pipelines", "init", tmp_path / "spec.yaml", *flags, "--validation", "held-out.jsonl")
    assert done.returncode == 0, done.stderr
    pilot = DistillationSpec.from_yaml(tmp_path / "spec.yaml").pilot
    assert [candidate.name for candidate in pilot.candidates] == ["as-it-is", "less"] and pilot.then == "stop"
    without = call("pipelines", "init", tmp_path / "other.yaml", *flags, "--validation", "")
    assert without.returncode == 2 and "pilot.candidates: need bits per byte" in without.stderr


def test_version():
    assert call("pipelines", "--version").stdout.startswith("xtoken ")


def test_status_tells_what_runs_and_what_was_lost(tmp_path):
    assert call("pipelines", "status", "--runs", tmp_path).stdout == f"{tmp_path}: no runs\n"
    for name, changes in (("alive", {}), ("lost", {"pid": 2**22 + 1}), ("done", {"state": "succeeded"})):
        (tmp_path / name).mkdir()
        status = Status.of_this_process(name, tmp_path / name / "log", 9)
        status.tell(tmp_path / name, task="distill", count=4, line="step 3/9  loss 2.0", **changes)
    assert [(s.name, s.state) for s in statuses(tmp_path)] == [
        ("done", "succeeded"), ("lost", "interrupted"), ("alive", "running")
    ]  # fmt: skip
    told = call("pipelines", "status", "--runs", tmp_path).stdout
    assert "alive: running, step 4/9 distill" in told and "step 3/9 loss 2.0" in told and os.getpid() != 2**22 + 1


def test_export_without_the_converter_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = call("pipelines", "export", tmp_path, "--gguf", tmp_path / "x.gguf")
    assert done.returncode == 2 and "convert_hf_to_gguf.py of llama.cpp is not on the PATH" in done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder as a run leaves it, its student a tiny model."""
    folder = tmp_path_factory.mktemp("finished")
    spec = tiny_run(folder)
    run = sample_run(folder / "parts")
    (folder / "out").mkdir()
    run.save(folder / "out" / "run.json")
    (folder / "out" / "spec.yaml").write_text(yaml.safe_dump(spec))
    for checkpoint in ("best", "last"):
        shutil.copytree(folder / "same", folder / "out" / "student" / checkpoint)
        (folder / "out" / "student" / checkpoint / "README.md").write_text(model_card(run, checkpoint))
    return folder / "out"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose protocol has no stand-in
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    with Hub({}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        yield hub


def test_a_student_is_pushed_with_its_card_and_loads_from_what_the_hub_has(finished, hub, tmp_path):
    for flags, checkpoint in (((), "best"), (("--public", "--checkpoint", "last"), "last")):
        done = call("pipelines", "push", finished, "org/small", *flags)
        assert done.returncode == 0 and hub.endpoint in done.stdout, done.stderr
        sent = {path.name: path.read_bytes() for path in (finished / "student" / checkpoint).iterdir()}
        assert hub.models == {"org/small": sent} and hub.private == {"org/small": not flags}
    for name, content in hub.models["org/small"].items():
        (tmp_path / name).write_bytes(content)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize(
    ("repository", "token", "told"),
    [
        ("org/small", "hf_another", "the hub refuses (401): Invalid username or password.; log in"),
        ("no name", "hf_of_the_tests", "cannot be pushed: Repo id must"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(finished, hub, repository, token, told, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    done = call("pipelines", "push", finished, repository)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and told in done.stderr and token not in done.stderr
    assert hub.models == {}


def test_chat_answers_beside_the_former_self(finished, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("once upon\n\n"))
    told = call("pipelines", "chat", finished, "--tokens", 4)
    assert told.returncode == 0 and re.search(r"you> before> .*\nstudent> .*\nyou> ", told.stdout, re.S), told
    monkeypatch.setattr("sys.stdin", io.StringIO("once upon\n"))  # the input ends
    alone = call("pipelines", "chat", finished, "--tokens", 4, "--alone")
    assert alone.returncode == 0 and "before>" not in alone.stdout and not alone.stderr, alone


@pytest.mark.parametrize(("works", "code"), [(True, 0), (False, 2)])
def test_export_calls_the_converter(finished, tmp_path, monkeypatch, works, code):
    """One that stands for llama.cpp's."""
    converter = tmp_path / "convert_hf_to_gguf.py"
    copied = "model.safetensors" if works else "none"
    converter.write_text(f"import shutil, sys\nshutil.copy(f'{{sys.argv[1]}}/{copied}', sys.argv[3])\n")
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = call("pipelines", "export", finished, "--gguf", tmp_path / "x.gguf", "--checkpoint", "last")
    assert done.returncode == code and (tmp_path / "x.gguf").exists() == works
    assert works or "could not convert" in done.stderr


def test_a_run_begins_without_the_libraries_that_its_steps_need():
    """Which take ten seconds to load: the process that steps are forked from does so meanwhile."""
    loaded = (
        "import sys, pipelines.local, pipelines.submit; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "[]\n"


def test_a_notebook_shows_bars(tmp_path, monkeypatch, capsys):
    """The lines of a run, as a notebook's kernel takes them."""
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=True)))
    status = Status.of_this_process("run", tmp_path / "log", 3)
    with (tmp_path / "log").open("w") as raw:
        progress = Progress(raw, status)
        with progress.following():
            for line in ("Executing task 'distill'", "    distill: started", "step 3/9  loss 2.0  00:12 left"):
                print(line)
                last = progress.bars.training
            assert (progress.bars.run.n, progress.bars.run.desc, last.n, last.total) == (0, "distill: ", 3, 9)
            assert last.postfix == "loss 2.0  00:12 left"
            print("Task 'distill' finished with status SUCCESS")
    assert progress.bars.run.n == 3 and "loss 2.0" not in capsys.readouterr().out


def test_every_command_is_a_line_of_help_and_has_an_example_that_parses():
    told = call("pipelines", "--help").stdout.partition("Commands:")[2]
    assert "..." not in told and list(cli.commands)[:2] == ["init", "validate"] and told.index("init") < told.index("compare")
    for name, command in cli.commands.items():
        example = re.fullmatch("For example: xtoken (.*)", command.epilog)
        assert example, name
        words = shlex.split(example[1])
        assert words[0] == name
        command.make_context(name, words[1:])  # raises for an option that is not there, and for one that is missing


def test_teachers_have_ids_by_their_models_names(tmp_path):
    teachers = ("Qwen/Qwen3-4B", "other/Qwen3-4B", "big=s3://bucket/models/Llama_3.1-8B/", "./__")
    flags = [word for teacher in teachers for word in ("--teacher", teacher)]
    done = call("pipelines", "init", tmp_path / "spec.yaml", "--student", "s", *flags, "--train", "t", "--validation", "")
    assert done.returncode == 0, done.stderr
    ids = [teacher.id for teacher in DistillationSpec.from_yaml(tmp_path / "spec.yaml").teachers]
    assert ids == ["qwen3-4b", "qwen3-4b-1", "big", "teacher"]


def test_a_first_spec_is_asked_for_or_told_by_flags(tmp_path, monkeypatch):
    """Whoever gives the data as a flag is asked nothing more: a script has nobody to answer."""
    flags = ("--student", "s", "--teacher", "t", "--train", "text")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert call("pipelines", "init", tmp_path / "told.yaml", *flags).returncode == 0
    assert DistillationSpec.from_yaml(tmp_path / "told.yaml").data.validation == ()
    monkeypatch.setattr("sys.stdin", io.StringIO("s\ntext\nt\nheld-out\n"))
    asked = call("pipelines", "init", tmp_path / "asked.yaml")
    assert asked.returncode == 0, asked.stderr
    parsed = DistillationSpec.from_yaml(tmp_path / "asked.yaml")
    assert (parsed.student.model, parsed.data.validation) == ("s", ("held-out",)) and parsed.evaluation.ce_baseline


def test_a_part_of_a_name_is_enough_to_find_a_field():
    assert "loss.kd_weight" in call("pipelines", "explain", "kd").stderr


@pytest.mark.parametrize("words", ["chat PLACE", "compare PLACE PLACE", "push PLACE me/student", "plan SPEC --from PLACE"])
def test_a_run_that_is_not_there_is_one_line(tmp_path, words):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tiny_run(tmp_path)))
    given = {"PLACE": str(tmp_path / "none"), "SPEC": str(tmp_path / "spec.yaml")}
    wrong = call("pipelines", *(given.get(word, word) for word in words.split()))
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith(f"{tmp_path}/none: no finished run lies there")


@pytest.mark.parametrize("command", ["plan", "show"])
def test_a_model_that_is_not_there_is_one_line_at_once(tmp_path, command, monkeypatch):
    """transformers would tell of each of its attempts, for a minute."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tiny_run(tmp_path, teachers=1)))
    wrong = call("pipelines", command, tmp_path / "spec.yaml", "--set", "teachers.other.model=me/none")
    assert wrong.returncode == 2 and wrong.stderr.startswith("teachers.other.model: me/none: no such folder, and not to be had")
    assert wrong.stderr.count("\n") == 1


def test_a_hub_that_cannot_be_reached_is_one_line(finished, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_TOKEN", "t")
    wrong = call("pipelines", "push", finished, "me/student")
    assert wrong.returncode == 2 and wrong.stderr.startswith("me/student: cannot be pushed: ") and wrong.stderr.count("\n") == 1
