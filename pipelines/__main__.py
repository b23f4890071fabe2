"""`xtoken`, or `python -m pipelines`: the commands of the project. Exit codes: 0 done, 1 a run that failed, 2 bad input."""

from __future__ import annotations

import sys
from importlib.metadata import version

import click

from components.cli import run_command
from pipelines.commands import cluster, completion, new, runs, specs, students, sweeps


@click.group()
@click.version_option(version("xtoken-pipelines"), message="xtoken %(version)s")
def cli() -> None:
    """Cross-tokenizer distillation on Kubeflow Pipelines, from one spec."""


for _command in (
    new.init,
    specs.validate,
    specs.explain,
    specs.schema,
    specs.plan,
    specs.show,
    specs.tokenizers,
    runs.run,
    runs.status,
    runs.compare,
    cluster.compile_,
    cluster.submit,
    sweeps.sweep,
    students.chat,
    students.export,
    students.push,
    completion.completion,
):
    cli.add_command(_command)


def main() -> None:
    """Entry point."""
    run_command(cli, "python -m pipelines" if sys.argv[0].endswith("__main__.py") else "xtoken")


if __name__ == "__main__":
    main()
