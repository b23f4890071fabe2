"""Where training's numbers go besides log.jsonl: TensorBoard, Weights & Biases, MLflow, a TrainJob's status, by transformers' callbacks.

Their servers, projects and credentials come from the environment, as their own tools take them (WANDB_*, MLFLOW_*).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtoken_core.errors import InputError, in_one_line
from xtoken_core.spec import DistillationSpec

if TYPE_CHECKING:
    from transformers import TrainerCallback

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
"""What to install for each tracker of `training.report_to`."""

PIPELINES_RUN = "MLFLOW_RUN_ID"
"""Environment variable: the MLflow run that Kubeflow Pipelines (2.17, with its MLflow plugin) has made for this step."""

PIPELINES_MLFLOW = (PIPELINES_RUN, "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_WORKSPACE", "MLFLOW_TRACKING_AUTH")
"""What it tells of that run. Its credentials, where it has some, are variables of their own."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises InputError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"training.report_to: {name} is not installed: pip install {PACKAGES[name]} (or 'xtoken-pipelines[tracking]')"
            )


@contextlib.contextmanager
def trackers(spec: DistillationSpec, out_dir: Path, baseline: bool) -> Iterator[list[TrainerCallback]]:
    """Begins a run in every tracker of `training.report_to`, and ends it, as failed after an error; yields their callbacks.

    A run is named by student and teachers, and carries the spec. TensorBoard's files and W&B's lie in `out_dir`, and so does
    MLflow's database unless the environment names a server; nothing is left in the working directory. Where Kubeflow Pipelines has
    made an MLflow run for this step, that run is used, whether or not `report_to` names MLflow. Inside a TrainJob whose
    Trainer asks for progress, the job's status is told it as well. Raises InputError.
    """
    names = spec.training.report_to
    check_trackers(names)
    begin = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    with contextlib.ExitStack() as stack:
        title = _title(spec, baseline)
        callbacks = [begin[name](stack, spec, out_dir, title) for name in names]
        if PIPELINES_RUN in os.environ and "mlflow" not in names:  # nobody has asked for it, so that no training fails for it
            try:
                check_trackers(("mlflow",))
                callbacks.append(_mlflow(stack, spec, out_dir, title))
            except InputError as e:
                print(f"the MLflow run that Kubeflow Pipelines has made is not used: {e}", flush=True)
        yield [*callbacks, *_progress()]


def _progress() -> list[TrainerCallback]:
    """What tells the status of the TrainJob that this is part of, if Trainer asks for it (by variables of its gate TrainJobRuntimeStatus)."""
    from transformers.integrations.integration_utils import KubeflowCallback, is_kubeflow_available

    return [KubeflowCallback()] if is_kubeflow_available() else []


def _title(spec: DistillationSpec, baseline: bool) -> str:
    student = Path(spec.student.model).name
    return f"{student}, cross-entropy alone" if baseline else f"{student} from {' + '.join(t.id for t in spec.teachers)}"


def _config(spec: DistillationSpec) -> dict[str, Any]:
    """What training reads of the spec, defaults left out."""
    return spec.model_dump(mode="json", exclude_defaults=True, include={"student", "teachers", "loss", "data", "training"})


def _tensorboard(stack: contextlib.ExitStack, spec: DistillationSpec, out_dir: Path, title: str) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(out_dir / "tensorboard")))


def _wandb(stack: contextlib.ExitStack, spec: DistillationSpec, out_dir: Path, title: str) -> TrainerCallback:
    import wandb
    from transformers.integrations import WandbCallback

    place = None if os.environ.get("WANDB_DIR") else str(out_dir)
    project = os.environ.get("WANDB_PROJECT", "xtoken")
    try:
        stack.enter_context(wandb.init(project=project, name=title, dir=place, config=_config(spec)))
    except wandb.errors.Error as e:
        raise InputError(f"training.report_to: wandb: {in_one_line(e)}") from e
    return WandbCallback()


def _mlflow(stack: contextlib.ExitStack, spec: DistillationSpec, out_dir: Path, title: str) -> TrainerCallback:
    import mlflow
    from transformers.integrations import MLflowCallback

    if not mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri(f"sqlite:///{(out_dir / 'mlflow.db').absolute()}")
        stack.callback(mlflow.set_tracking_uri, None)  # type: ignore[arg-type]  # as it was
    name = None if PIPELINES_RUN in os.environ else title  # a run that is there keeps its name
    try:
        stack.enter_context(mlflow.start_run(run_name=name, tags={"spec": json.dumps(_config(spec))}))
    except (mlflow.exceptions.MlflowException, ImportError) as e:
        raise InputError(f"training.report_to: mlflow: {in_one_line(e)}") from e
    return MLflowCallback()
