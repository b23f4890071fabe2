"""`python -m pipelines validate|compile|run|submit SPEC [--set KEY=VALUE]...`: exit codes 0 done, 1 failed, 2 bad input."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from components.cli import run_command
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec

SPEC = click.argument("spec", type=click.Path(path_type=Path))
SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field: training.max_steps=200.")


@click.group()
def cli() -> None:
    """Cross-tokenizer distillation on Kubeflow Pipelines, from one spec."""


@cli.command()
@SPEC
@SET
def validate(spec: Path, overrides: tuple[str, ...]) -> None:
    """Check a spec; touches no model, data or network."""
    parsed = DistillationSpec.from_yaml(spec, overrides)
    click.echo(f"{spec}: valid: {parsed.student.model} from {', '.join(t.model for t in parsed.teachers)}")


@cli.command()
@SPEC
@SET
@click.option("--run", "finished", metavar="RUN", help="A finished run, whose speed is taken; RUN is what its output.uri said.")
def plan(spec: Path, overrides: tuple[str, ...], finished: str | None) -> None:
    """Tell what a run will take: rows, tokens, memory, downloads, GPU hours, disk. Reads configurations and file sizes only."""
    from xtoken_core.report.plan import plan_text
    from xtoken_core.report.run import Run
    from xtoken_core.storage import RUN_FILE, local_copy
    from xtoken_core.workflow.plan import plan as planned

    measured = None if finished is None else Run.load(local_copy(f"{finished.rstrip('/')}/{RUN_FILE}"))
    click.echo(plan_text(planned(DistillationSpec.from_yaml(spec, overrides), measured)))


@cli.command("compile")
@click.argument("spec", type=click.Path(path_type=Path), required=False)
@SET
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to; default: standard output.")
@click.option("--check", is_flag=True, help="Without SPEC: only say which compiled forms are stale; exit 1 if any is.")
def compile_(spec: Path | None, overrides: tuple[str, ...], output: Path | None, check: bool) -> None:
    """Compile a spec to KFP's YAML; without SPEC, bring pipelines/compiled up to date."""
    from pipelines import compiling
    from pipelines.cluster import image_caution, output_caution, retry_caution
    from xtoken_core.workflow.resolve import check_ranks

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
        if output is None:
            click.echo(text, nl=False)
        else:
            try:
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(text, encoding="utf-8")
            except OSError as e:
                raise InputError(f"{output}: cannot be written: {e.strerror}") from None
            click.echo(f"{output}: written")
    elif check:
        stale = compiling.stale()
        for path in stale:
            click.echo(f"{path.name}: its compiled form is stale; run `make compile`")
        sys.exit(1 if stale else 0)
    else:
        for path in compiling.compile_all():
            click.echo(f"{path.name}: compiled anew")


@cli.command()
@SPEC
@SET
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder for working files."
)
def run(spec: Path, overrides: tuple[str, ...], runs: Path) -> None:
    """Run a spec on this machine, through KFP's local runner."""
    from pipelines.local import RunFailed, answer, ended_by_sigterm, run_locally

    parsed = DistillationSpec.from_yaml(spec, overrides)
    try:
        with ended_by_sigterm(parsed.name):
            finished = run_locally(parsed, runs)
    except RunFailed as e:
        click.echo(str(e), err=True)
        sys.exit(1)
    click.echo(f"\n{answer(parsed, finished)}")


@cli.command()
@SPEC
@SET
@click.option(
    "--endpoint", envvar="KF_PIPELINES_ENDPOINT", help="URL of Kubeflow Pipelines; default: from the kubeconfig, or in-cluster."
)
@click.option("--namespace", help="Kubernetes namespace, where Kubeflow has several users.")
@click.option(
    "--existing-token", envvar="KF_PIPELINES_TOKEN", help="Token that authenticates; better given as $KF_PIPELINES_TOKEN."
)
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


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("compare.html"), show_default=True, help="The page."
)
def compare(runs: tuple[str, ...], output: Path) -> None:
    """Put finished runs side by side on one page; RUN is what a spec's output.uri said."""
    from xtoken_core.report.compare import write_comparison
    from xtoken_core.report.run import Run
    from xtoken_core.storage import RUN_FILE, local_copy

    write_comparison([Run.load(local_copy(f"{run.rstrip('/')}/{RUN_FILE}")) for run in runs], output)
    click.echo(f"{output}: {len(runs)} runs compared")


@cli.command()
@click.argument("tokenizers", nargs=-1, required=True, metavar="TOKENIZER...")
@click.option("--output", required=True, metavar="FOLDER", help="For overlap.json and the heat map, overlap.png.")
def tokenizers(tokenizers: tuple[str, ...], output: str) -> None:
    """Compare the vocabularies of any number of tokenizers, each with each."""
    from xtoken_core.workflow.vocabularies import compare_tokenizers

    found = compare_tokenizers(tokenizers, output)
    width = max(map(len, found.names))
    for name, row in zip(found.names, found.coefficient):
        click.echo(f"{name:{width}} " + " ".join(f"{value:.4f}" for value in row))


def main() -> None:
    """Entry point."""
    run_command(cli, "python -m pipelines")


if __name__ == "__main__":
    main()
