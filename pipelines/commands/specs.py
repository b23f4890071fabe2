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


@click.command()
@SPEC
@SET
def validate(spec: Path, overrides: tuple[str, ...]) -> None:
    """Check a spec; touches no model, data or network."""
    parsed = DistillationSpec.from_yaml(spec, overrides)
    click.echo(f"{spec}: valid: {parsed.student.model} from {', '.join(t.model for t in parsed.teachers)}")


@click.command()
@click.argument("field", required=False, shell_complete=fields)
def explain(field: str | None) -> None:
    """Tell what a field of the spec means, which values it takes and its default; of a section, its fields; without FIELD, all."""
    wanted = (field or "").replace("[]", "").strip(".")
    found = [known for known in spec_fields(DistillationSpec) if _within(known.path.replace("[]", ""), wanted)]
    if not found:
        names = [known.path.replace("[]", "") for known in spec_fields(DistillationSpec)]
        close = [name for name in names if name.rpartition(".")[2] == wanted.rpartition(".")[2]]
        close = close or difflib.get_close_matches(wanted, names, 3)
        raise InputError(f"{field}: no such field" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    click.echo("\n\n".join(map(_explained, found)))


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to; default: standard output.")
def schema(output: Path | None) -> None:
    """Write the spec's JSON schema, by which editors complete and check fields; `init` names it in the specs that it writes."""
    text = json.dumps(DistillationSpec.model_json_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        write_text(output, text)
        click.echo(f"{output}: written")


@click.command()
@SPEC
@SET
@click.option(
    "--from",
    "--run",
    "finished",
    metavar="RUN",
    help="A finished run, whose speed is taken, and of the same data its rows and tokens; RUN is what its output.uri said.",
)
def plan(spec: Path, overrides: tuple[str, ...], finished: str | None) -> None:
    """Tell what a run will take: rows, tokens, memory, downloads, GPU hours, disk. Reads configurations and file sizes only."""
    from xtoken_core.report.plan import plan_text
    from xtoken_core.report.run import Run
    from xtoken_core.storage import RUN_FILE, local_copy
    from xtoken_core.workflow.plan import plan as planned

    measured = None if finished is None else Run.load(local_copy(f"{finished.rstrip('/')}/{RUN_FILE}"))
    click.echo(plan_text(planned(DistillationSpec.from_yaml(spec, overrides), measured)))


@click.command()
@SPEC
@SET
@click.option("--rows", type=click.IntRange(1, 100), default=3, show_default=True, help="How many.")
def show(spec: Path, overrides: tuple[str, ...], rows: int) -> None:
    """Show a few rows as each tokenizer sees them, what is to be learned in colour. $NO_COLOR: in brackets."""
    from xtoken_core.data.show import shown_rows

    colour = not os.environ.get("NO_COLOR")
    for text in shown_rows(DistillationSpec.from_yaml(spec, overrides), rows, colour):
        click.echo(f"{text}\n", color=colour)


@click.command()
@click.argument("tokenizers", nargs=-1, required=True, metavar="TOKENIZER...")
@click.option("--output", required=True, metavar="FOLDER", help="For overlap.json and the heat map, overlap.png.")
def tokenizers(tokenizers: tuple[str, ...], output: str) -> None:
    """Compare the vocabularies of any number of tokenizers, each with each."""
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
