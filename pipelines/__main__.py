"""`xtoken`, or `python -m pipelines`: the commands of the project. Exit codes: 0 done, 1 a run that failed, 2 bad input."""

from __future__ import annotations

import sys
from importlib.metadata import version

import click

from components.cli import run_command
from pipelines.commands import cluster, completion, new, runs, specs, students, sweeps


class Verbs(click.Group):
    """The commands in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(self.commands)


@click.group(cls=Verbs, epilog="xtoken COMMAND --help has an example of each. First: init, validate, show, plan, run.")
@click.version_option(version("xtoken-pipelines"), message="xtoken %(version)s")
def cli() -> None:
    """Cross-tokenizer distillation on Kubeflow Pipelines, from one spec."""


for _command in (
    new.init,
    specs.validate,
    specs.explain,
    specs.show,
    specs.plan,
    runs.run,
    runs.status,
    runs.compare,
    students.chat,
    students.export,
    students.push,
    cluster.compile_,
    cluster.submit,
    sweeps.sweep,
    specs.tokenizers,
    specs.schema,
    completion.completion,
):
    cli.add_command(_command)


def main() -> None:
    """Entry point."""
    run_command(cli, "python -m pipelines" if sys.argv[0].endswith("__main__.py") else "xtoken")


if __name__ == "__main__":
    main()
