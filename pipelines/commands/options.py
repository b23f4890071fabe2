"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path

import click

from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec
from xtoken_core.spec.fields import spec_fields


def fields(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """The fields of the spec whose names begin so, for shell completion."""
    names = [field.path.replace("[]", "") for field in spec_fields(DistillationSpec)]
    return [name for name in names if name.startswith(begun)]


def settings(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """The fields as `--set` takes them, for shell completion; those of a teacher have its id in their names."""
    leaves = {field.path for field in spec_fields(DistillationSpec) if not field.section}
    return [f"{name}=" for name in fields(context, parameter, begun) if name in leaves]


SPEC = click.argument("spec", type=click.Path(path_type=Path))
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=settings,
    help="Change a field: training.max_steps=200.",
)
RUNS = click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder for working files."
)
ENDPOINT = click.option(
    "--endpoint", envvar="KF_PIPELINES_ENDPOINT", help="URL of Kubeflow Pipelines; default: from the kubeconfig, or in-cluster."
)
NAMESPACE = click.option("--namespace", help="Kubernetes namespace, where Kubeflow has several users.")
TOKEN = click.option(
    "--existing-token", envvar="KF_PIPELINES_TOKEN", help="Token that authenticates; better given as $KF_PIPELINES_TOKEN."
)


def write_text(path: Path, text: str) -> None:
    """Writes a file that a user has named, with the folders it lies in. Raises InputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror}") from None
