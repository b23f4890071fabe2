"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path

import click

from xtoken_core.errors import InputError

SPEC = click.argument("spec", type=click.Path(path_type=Path))
SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field: training.max_steps=200.")
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
