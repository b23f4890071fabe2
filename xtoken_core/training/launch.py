"""A training on every GPU of this host: one process each, as torchrun would start them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from xtoken_core.errors import InputError, RunError, errors_left_in, leave_error, left_error
from xtoken_core.processes import end_with, show_log


def on_every_gpu(gpus: int, body: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Runs `body` in `gpus` processes; returns the first rank's result. Raises the InputError or RunError of the first to fail."""
    config = LaunchConfig(1, 1, gpus, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    with tempfile.TemporaryDirectory() as folder, errors_left_in(error := Path(folder) / "error"):
        try:
            return elastic_launch(config, _rank)(os.getpid(), body, *arguments)[0]
        except ChildFailedError:
            left = left_error(error)
            if left is None:
                raise
            raise left from None


def _rank(launcher: int, body: Callable[..., Any], *arguments: Any) -> Any:
    show_log()
    end_with(launcher)
    try:
        return body(*arguments)
    except (InputError, RunError) as e:
        leave_error(e)
        raise
