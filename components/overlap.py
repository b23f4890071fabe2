"""Compare the vocabularies of the student and its teachers, and settle each teacher's loss mode.

Without a spec, `python -m components.overlap compare TOKENIZER... --output FOLDER` compares any number of tokenizers.
"""

import sys
from typing import NamedTuple

import click
from kfp.dsl import Artifact, Output

from components.cli import component, main, run_command


@component
def overlap(spec: str, report: Output[Artifact]) -> NamedTuple("Outputs", [("modes", dict)]):  # type: ignore[valid-type]
    """Audit the vocabularies: overlap, coverage per class of token, fingerprints.

    Prints the loss mode of each cross-tokenizer teacher.

    Args:
        spec: Student, teachers and loss mode are read.
        report: The audit, as JSON.
    """
    import json
    from pathlib import Path

    from xtoken_core.workflow.step import step

    with step("overlap", report):
        from xtoken_core.spec import DistillationSpec
        from xtoken_core.workflow.vocabularies import overlap_report

        audit = overlap_report(DistillationSpec.from_text(spec))
        Path(report.path).write_text(json.dumps(audit, ensure_ascii=False), encoding="utf-8")
        return ({teacher: result["mode"] for teacher, result in audit["teachers"].items()},)


@click.command()
@click.argument("tokenizers", nargs=-1, required=True)
@click.option("--output", required=True, metavar="FOLDER", help="For overlap.json and the heat map, overlap.png.")
def compare(tokenizers: tuple[str, ...], output: str) -> None:
    """Compare the vocabularies of any number of tokenizers, each with each."""
    from xtoken_core.workflow.vocabularies import compare_tokenizers

    found = compare_tokenizers(tokenizers, output)
    width = max(map(len, found["names"]))
    for name, row in zip(found["names"], found["coefficient"]):
        click.echo(f"{name:{width}} " + " ".join(f"{value:.4f}" for value in row))


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        del sys.argv[1]
        run_command(compare, "python -m components.overlap compare")
    else:
        main(overlap)
