"""Where a step runs: its namespace, and the run of Kubeflow Pipelines that it belongs to."""

from __future__ import annotations

import os
from pathlib import Path

from xtoken_core.results.workflow import PipelineRun
from xtoken_core.workflow.step import RUNNER

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

OF_RUN = {"KFP_RUN_ID": ("labels", "pipeline/runid"), "KFP_RUN_NAME": ("annotations", "pipelines.kubeflow.org/run_name")}
"""Where Kubeflow Pipelines writes a step's run on its pod, by the variable that a launcher has it as."""


def namespace() -> str | None:
    """The namespace of this pod; None outside a cluster, and for an account whose token is not mounted."""
    return NAMESPACE_FILE.read_text(encoding="utf-8").strip() if NAMESPACE_FILE.exists() else None


def pipeline_run(run_id: str, pages: str | None) -> PipelineRun | None:
    """The run of this id, with its page where the address of Kubeflow Pipelines' `pages` is known; None for a run on this machine."""
    if not run_id or RUNNER in os.environ:
        return None
    return PipelineRun(id=run_id, namespace=namespace(), url=pages and f"{pages.rstrip('/')}/#/runs/details/{run_id}")


def run_metadata() -> dict[str, dict[str, str]]:
    """Labels and annotations of what this step makes: the run that made it, as on this pod; empty outside a run."""
    found: dict[str, dict[str, str]] = {}
    for variable, (kind, key) in OF_RUN.items():
        if value := os.environ.get(variable):
            found.setdefault(kind, {})[key] = value
    return found
