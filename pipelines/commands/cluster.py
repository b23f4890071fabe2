"""What concerns a cluster: compile, submit."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pipelines.commands.options import ENDPOINT, NAMESPACE, SET, SPEC, TOKEN, write_text
from xtoken_core.spec import DistillationSpec


@click.command("compile", epilog="For example: xtoken compile spec.yaml -o run.yaml")
@click.argument("spec", type=click.Path(path_type=Path), required=False)
@SET
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to; default: standard output.")
@click.option("--check", is_flag=True, help="Without SPEC: only say which compiled forms are stale; exit 1 if any is.")
def compile_(spec: Path | None, overrides: tuple[str, ...], output: Path | None, check: bool) -> None:
    """Compile a spec to KFP's YAML.

    Without SPEC, brings pipelines/compiled up to date.
    """
    from pipelines import compiling
    from pipelines.cautions import image_caution, output_caution, retry_caution, size_caution
    from xtoken_core.workflow.shape import check_ranks

    if check and spec is not None:
        raise click.UsageError("--check: is about the specs of pipelines/specs; give no SPEC")
    if spec is None and (overrides or output):
        raise click.UsageError("--set, -o: need a SPEC")
    if spec is not None:
        parsed = DistillationSpec.from_yaml(spec, overrides)
        check_ranks(parsed)
        for caution in (image_caution(parsed.resources.image), output_caution(parsed), retry_caution(parsed)):
            if caution:
                click.echo(caution, err=True)
        text = compiling.compile_spec(parsed)
        if caution := size_caution(text):
            click.echo(caution, err=True)
        if output is None:
            click.echo(text, nl=False)
        else:
            write_text(output, text)
            click.echo(f"{output}: written")
    elif check:
        stale = compiling.stale()
        for path in stale:
            click.echo(f"{path.name}: its compiled form is stale; run `make compile`")
        sys.exit(1 if stale else 0)
    else:
        for path in compiling.compile_all():
            click.echo(f"{path.name}: compiled anew")


@click.command(epilog="For example: xtoken submit spec.yaml --endpoint https://kubeflow.example.org/pipeline --wait")
@SPEC
@SET
@ENDPOINT
@NAMESPACE
@TOKEN
@click.option("--experiment", help="Experiment that the run belongs to; made if it is not there; default: the spec's name.")
@click.option(
    "--pipeline-root", metavar="URI", help="Where the steps' results go; default: where this Kubeflow Pipelines puts them."
)
@click.option("--wait", is_flag=True, help="Follow the run's tasks; exit 1 unless it has SUCCEEDED.")
def submit(
    spec: Path,
    overrides: tuple[str, ...],
    endpoint: str | None,
    namespace: str | None,
    existing_token: str | None,
    experiment: str | None,
    pipeline_root: str | None,
    wait: bool,
) -> None:
    """Start a run of a spec on a cluster."""
    from pipelines.submit import Cluster, follow
    from pipelines.submit import submit as start

    cluster = Cluster(endpoint, namespace, existing_token)
    client, run_id = start(spec, overrides, cluster, experiment, pipeline_root, click.echo)
    if wait and follow(client, run_id, cluster, click.echo) != "SUCCEEDED":
        sys.exit(1)
