"""What concerns a spec only: validate, explain, schema, plan, show; and tokenizers, the vocabularies that one may name."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

import click

from pipelines.commands.options import SET, SPEC, fields, write_text
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec
from xtoken_core.spec.fields import SpecField, spec_fields


@click.command(epilog="For example: xtoken validate spec.yaml --set training.max_steps=200")
@SPEC
@SET
def validate(spec: Path, overrides: tuple[str, ...]) -> None:
    """Check a spec, without any model, data or network."""
    parsed = DistillationSpec.from_yaml(spec, overrides)
    click.echo(f"{spec}: valid: {parsed.student.model} from {', '.join(t.model for t in parsed.teachers)}")


@click.command(epilog="For example: xtoken explain loss.mode")
@click.argument("field", required=False, shell_complete=fields)
def explain(field: str | None) -> None:
    """Tell what a field of the spec means.

    Its values, its default and an example; of a section all of its fields; without FIELD, every one.
    """
    wanted = (field or "").replace("[]", "").strip(".")
    found = [known for known in spec_fields(DistillationSpec) if _within(known.path.replace("[]", ""), wanted)]
    if not found:
        names = [known.path.replace("[]", "") for known in spec_fields(DistillationSpec)]
        close = [name for name in names if name.rpartition(".")[2] == wanted.rpartition(".")[2]]
        close = close or [name for name in names if wanted and wanted in name.rpartition(".")[2]][:5]
        close = close or difflib.get_close_matches(wanted, names, 3)
        raise InputError(f"{field}: no such field" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    click.echo("\n\n".join(map(_explained, found)))


@click.command(epilog="For example: xtoken schema -o xtoken.schema.json")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to; default: standard output.")
def schema(output: Path | None) -> None:
    """Write the spec's JSON schema, for editors.

    By it they complete and check fields. `init` writes it beside a spec, and names it there.
    """
    text = json.dumps(DistillationSpec.model_json_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        write_text(output, text)
        click.echo(f"{output}: written")


@click.command(epilog="For example: xtoken plan spec.yaml --from runs/my-student/output")
@SPEC
@SET
@click.option(
    "--from",
    "finished",
    metavar="RUN",
    help="A finished run, whose speed is taken, and of the same data its rows and tokens; RUN is what its output.uri said.",
)
def plan(spec: Path, overrides: tuple[str, ...], finished: str | None) -> None:
    """Tell hours, memory and disk of a run before it runs.

    Reads configurations and file sizes only.
    """
    from xtoken_core.report.plan import plan_text
    from xtoken_core.report.run import Run
    from xtoken_core.workflow.plan import plan as planned
    from xtoken_core.workflow.versions import check_models_are_there

    parsed = DistillationSpec.from_yaml(spec, overrides)
    measured = None if finished is None else Run.published(finished)
    check_models_are_there(parsed)
    click.echo(plan_text(planned(parsed, measured)))


@click.command(epilog="For example: xtoken show spec.yaml --rows 5")
@SPEC
@SET
@click.option("--rows", type=click.IntRange(1, 100), default=3, show_default=True, help="How many.")
def show(spec: Path, overrides: tuple[str, ...], rows: int) -> None:
    """Show a few rows as each tokenizer sees them.

    What is to be learned is in colour, or with $NO_COLOR in brackets.
    """
    from xtoken_core.data.show import shown_rows
    from xtoken_core.workflow.versions import check_models_are_there

    parsed, colour = DistillationSpec.from_yaml(spec, overrides), not os.environ.get("NO_COLOR")
    check_models_are_there(parsed)
    for text in shown_rows(parsed, rows, colour):
        click.echo(f"{text}\n", color=colour)


@click.command(epilog="For example: xtoken tokenizers Qwen/Qwen3-4B meta-llama/Llama-3.2-1B --output overlap")
@click.argument("tokenizers", nargs=-1, required=True, metavar="TOKENIZER...")
@click.option("--output", required=True, metavar="FOLDER", help="For overlap.json and the heat map, overlap.png.")
def tokenizers(tokenizers: tuple[str, ...], output: str) -> None:
    """Compare vocabularies of tokenizers, each with each."""
    from xtoken_core.workflow.vocabularies import compare_tokenizers

    found = compare_tokenizers(tokenizers, output)
    width = max(map(len, found.names))
    for name, row in zip(found.names, found.coefficient):
        click.echo(f"{name:{width}} " + " ".join(f"{value:.4f}" for value in row))


def _within(path: str, wanted: str) -> bool:
    return not wanted or path == wanted or path.startswith(f"{wanted}.")


def _explained(field: SpecField) -> str:
    lines = [field.path, f"    {field.description}" if field.description else ""]
    if not field.section:
        lines.append(f"    values: {field.kind}; default: {field.default}")
    if field.examples:
        lines.append(f"    for example: {', '.join(field.examples)}")
    return "\n".join(filter(None, lines))
