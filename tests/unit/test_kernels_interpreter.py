"""The kernels' logic on a CPU, through Triton's interpreter, against the plain path."""

from __future__ import annotations

import os

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a GPU is here: tests/gpu runs the kernels themselves", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import interpreter  # noqa: E402

from tests.unit.kernel_cases import CASES, compare  # noqa: E402

_patch = interpreter._patch_lang_tensor


def _patch_for_numpy_2_4(tensor, scope):
    """NumPy 2.4 no longer turns an array of one element into an integer, which Triton 3.6's interpreter relies on for loop bounds."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))


interpreter._patch_lang_tensor = _patch_for_numpy_2_4


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_plain_path(name):
    compare(CASES[name], torch.device("cpu"), torch.float32)
