"""The GPUs that a test may use."""

from __future__ import annotations

import os

import pytest
import torch


def first_gpus(count: int) -> str:
    """CUDA_VISIBLE_DEVICES of a process that is to see the first of ours."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return ",".join((ours if ours != [""] else [str(n) for n in range(torch.cuda.device_count())])[:count])


def needs_gpus(count: int) -> pytest.MarkDecorator:
    """Skips a test where there are fewer."""
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPUs")
