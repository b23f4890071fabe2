"""Runs on this machine, and what has become of runs: run, status, compare."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pipelines.commands.options import ENDPOINT, NAMESPACE, RUNS, SET, SPEC, TOKEN
from xtoken_core.spec import DistillationSpec


@click.command(epilog="For example: xtoken run spec.yaml --set training.max_steps=200")
@SPEC
@SET
@RUNS
def run(spec: Path, overrides: tuple[str, ...], runs: Path) -> None:
    """Run a spec on this machine.

    Through KFP's local runner. Steps whose inputs are unchanged come from the cache; an interrupted training goes on.
    """
    from pipelines.local import RunFailed, answer, ended_by_sigterm, kept, run_locally

    parsed = DistillationSpec.from_yaml(spec, overrides)
    try:
        with ended_by_sigterm(parsed.name):
            finished = run_locally(parsed, runs)
    except RunFailed as e:
        click.echo(str(e), err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo(f"\n{kept(parsed)}", err=True)
        sys.exit(130)
    click.echo(f"\n{answer(parsed, finished)}")


@click.command(epilog="For example: xtoken status --endpoint https://kubeflow.example.org/pipeline")
@RUNS
@ENDPOINT
@NAMESPACE
@TOKEN
def status(runs: Path, endpoint: str | None, namespace: str | None, existing_token: str | None) -> None:
    """Tell how runs fare, here or (--endpoint) on a cluster."""
    from pipelines.status import statuses, told

    if endpoint is None:
        lines = [told(found) for found in statuses(runs)]
        click.echo("\n".join(lines) or f"{runs}: no runs")
    else:
        from pipelines.submit import Cluster, last_runs

        click.echo("\n".join(last_runs(Cluster(endpoint, namespace, existing_token))) or f"{endpoint}: no runs")


@click.command(epilog="For example: xtoken compare runs/first/output runs/second/output")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("compare.html"), show_default=True, help="The page."
)
def compare(runs: tuple[str, ...], output: Path) -> None:
    """Put finished runs side by side on one page.

    RUN is what a spec's output.uri said.
    """
    from xtoken_core.report.compare import write_comparison
    from xtoken_core.report.run import Run

    write_comparison([Run.published(run) for run in runs], output)
    click.echo(f"{output}: {len(runs)} runs compared")
