"""`init`: a first spec, valid and commented."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from pipelines.commands.options import write_text
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec

SCHEMA = "xtoken.schema.json"

PILOT = """pilot:
  candidates:                # tried in short runs, each against cross-entropy only
    - name: as-it-is
    - name: less             # KD at 0.3 of cross-entropy
      set: [loss.dynamic_scaling=0.3]
  budget: 0.3                # steps of all short runs, as a share of max_steps
  then: stop                 # with the verdict; best: the main run follows
"""


@click.command(
    epilog="For example: xtoken init --student org/small --teacher Qwen/Qwen3-4B --train 'text/*.jsonl' --validation held-out.jsonl"
)
@click.argument("spec", type=click.Path(path_type=Path), default=Path("spec.yaml"))
@click.option("--kind", type=click.Choice(["text", "chat"]), default="text", show_default=True, help="What the data are.")
@click.option("--student", prompt="Student (hub id, folder or URI)", help="Hub id, folder or URI of the model that learns.")
@click.option("--teacher", "teachers", multiple=True, metavar="[ID=]MODEL", help="A model to learn from; may be repeated.")
@click.option("--train", prompt="Training data (file, folder, glob or URI)", help="File, folder, glob or URI of the documents.")
@click.option("--validation", help="The same, held out.")
@click.option("--pilot", is_flag=True, help="Begin with short runs of two candidates, and a verdict on the whole.")
@click.option("--name", default="my-student", show_default=True, help="Of the run; its output goes to runs/NAME/output.")
@click.pass_context
def init(context: click.Context, spec: Path, pilot: bool, validation: str | None, **answers: str) -> None:
    """Write a first spec, by flags or by asking.

    Beside it goes the schema by which editors complete and check its fields.
    """
    if spec.exists():
        raise InputError(f"{spec}: is there already")
    given = answers["teachers"] or (click.prompt("Teacher (hub id, folder or URI; more than one by --teacher)"),)
    if validation is None and context.get_parameter_source("train") is ParameterSource.PROMPT:
        validation = click.prompt("Validation data (file, folder, glob or URI; empty: none)", default="", show_default=False)
    text = spec_text({**answers, "teachers": tuple(given), "validation": validation or ""}) + (PILOT if pilot else "")
    DistillationSpec.from_text(text, source=str(spec))
    write_text(spec, text)
    write_text(spec.parent / SCHEMA, json.dumps(DistillationSpec.model_json_schema(), indent=1) + "\n")
    click.echo(f"{spec}: written; next: xtoken show {spec}, xtoken plan {spec}, xtoken run {spec}")


def spec_text(given: dict[str, str | tuple[str, ...]]) -> str:
    """The spec's YAML from the options of `init`."""
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in given.items() if isinstance(value, str)}
    teachers = "\n".join(map(_teacher, _ids(given["teachers"]), given["teachers"]))
    held_out = f"  validation: [{quoted['validation']}]   # chooses the best checkpoint, and says whether it helped\n"
    evaluation = "evaluation:\n  ce_baseline: true          # a twin without teachers: what the text alone would have taught\n"
    return f"""# yaml-language-server: $schema={SCHEMA}
# Every field: xtoken explain; one: xtoken explain training.learning_rate. Paths are relative to the folder in which xtoken is called.
name: {quoted["name"]}
student:
  model: {quoted["student"]}
teachers:
{teachers}
data:
  train: [{quoted["train"]}]
{held_out if given["validation"] else ""}  format: {"messages" if given["kind"] == "chat" else "text"}{_about(given)}
  max_length: 1024           # tokens of a row
training:
  max_steps: 400             # or epochs
  global_batch_size: 32      # rows of an optimizer step, over all GPUs
  micro_batch_size: 4        # rows that fit at once on one
  learning_rate: 1e-4
  warmup_steps: 20
  save_steps: 100            # an interrupted run goes on from here
{"  eval_steps: 100" + chr(10) if given["validation"] else ""}{evaluation if given["validation"] else ""}output:
  uri: {json.dumps(f"runs/{given['name']}/output")}
"""


def _about(given: dict[str, str | tuple[str, ...]]) -> str:
    return "           # chats, through the models' own templates; only assistant turns teach" if given["kind"] == "chat" else ""


def _ids(teachers: Sequence[str]) -> list[str]:
    """What is given before `=`, else the model's own name in letters that an id may have; the second of a name is numbered."""
    given = [teacher.rpartition("=") for teacher in teachers]
    own = [name or re.sub("[^a-z0-9]+", "-", Path(model).name.lower()).strip("-") or "teacher" for name, _, model in given]
    return [name if name not in own[:at] else f"{name}-{at}" for at, name in enumerate(own)]


def _teacher(name: str, given: str) -> str:
    model = given.rpartition("=")[2]
    return (
        f"  - id: {json.dumps(name)}\n    model: {json.dumps(model, ensure_ascii=False)}\n"
        "    projection: {}           # for another tokenizer than the student's; leave it out for the same one"
    )
