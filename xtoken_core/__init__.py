"""The library behind the pipelines: alignment, projection, losses, teachers, training, evaluation, report."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.api import run
    from xtoken_core.losses import distillation_loss
    from xtoken_core.spec import DistillationSpec

__all__ = ["DistillationSpec", "distillation_loss", "run"]

_HOMES = {"DistillationSpec": "xtoken_core.spec", "distillation_loss": "xtoken_core.losses", "run": "pipelines.api"}


def __getattr__(name: str) -> Any:
    """Imports a public call when it is first asked for: torch and kfp take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
