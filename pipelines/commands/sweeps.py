"""sweep: the same spec with fields of its training at several values."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import yaml

from pipelines.commands.options import ENDPOINT, NAMESPACE, RUNS, SET, SPEC, TOKEN, write_text


@click.command(epilog="For example: xtoken sweep spec.yaml --over loss.kd_weight=0.5,1,2")
@SPEC
@SET
@click.option(
    "--over", multiple=True, required=True, metavar="KEY=A,B,...", help="Values of a field; of several, every combination."
)
@RUNS
@click.option("--page", type=click.Path(path_type=Path), default=Path("compare.html"), show_default=True, help="The comparison.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Only compile, to this file.")
@click.option(
    "--rows-of",
    metavar="URI",
    help="With -o: an OptimizationJob of Kubeflow Trainer, on the rows of the finished run at this output.uri.",
)
@click.option("--submit", "submitted", is_flag=True, help="Run on a cluster, and not on this machine.")
@ENDPOINT
@NAMESPACE
@TOKEN
def sweep(
    spec: Path,
    overrides: tuple[str, ...],
    over: tuple[str, ...],
    runs: Path,
    page: Path,
    output: Path | None,
    rows_of: str | None,
    submitted: bool,
    endpoint: str | None,
    namespace: str | None,
    existing_token: str | None,
) -> None:
    """Run a spec with fields of its training at several values.

    It is one workflow, which shares everything but training. Each run is published under its values at output.uri; one page puts them side by side. The trials of an OptimizationJob only train.
    """
    from pipelines.cautions import size_caution
    from pipelines.compiling import compile_sweep
    from pipelines.sweeps import optimization, variants

    if rows_of is not None:
        if output is None or submitted:
            raise click.UsageError("--rows-of: writes a resource for kubectl; give -o, and no --submit")
        write_text(output, yaml.safe_dump(optimization(spec, overrides, over, rows_of), sort_keys=False))
        click.echo(f"{output}: written; kubectl create -f {output}")
        return
    found = variants(spec, overrides, over)
    if output is not None:
        text = compile_sweep(found)
        if caution := size_caution(text):
            click.echo(caution, err=True)
        write_text(output, text)
        click.echo(f"{output}: written: {', '.join(found)}")
    elif submitted:
        from pipelines.submit import Cluster, submit_sweep

        submit_sweep(spec, found, Cluster(endpoint, namespace, existing_token), click.echo)
    else:
        from pipelines.local import RunFailed, ended_by_sigterm, sweep_locally
        from xtoken_core.report.compare import write_comparison

        try:
            with ended_by_sigterm("sweep"):
                finished = sweep_locally(found, runs)
        except RunFailed as e:
            click.echo(str(e), err=True)
            sys.exit(1)
        click.echo(f"{write_comparison(finished, page)}: {len(finished)} runs compared")
