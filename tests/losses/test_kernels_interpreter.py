"""The kernels' logic on a CPU, through Triton's interpreter, against the plain path."""

from __future__ import annotations

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a GPU is here: tests/gpu runs the kernels themselves", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from tests.support.kernel_cases import CASES, compare  # noqa: E402
from xtoken_core.losses import selection  # noqa: E402

pytestmark = pytest.mark.slow

_patch, _patch_all = interpreter._patch_lang_tensor, interpreter._patch_lang


def _patch_for_numpy_2_4(tensor, scope):
    """NumPy 2.4 no longer turns an array of one element into an integer, which Triton 3.6's interpreter relies on for loop bounds."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))


def _patch_once(fn):
    """Every function that a kernel calls would replace the whole language again: a third of the time."""
    needed = any(value is lang and tl.core.is_builtin(lang.load) for lang in (tl, tl.core) for value in fn.__globals__.values())
    return _patch_all(fn) if needed else interpreter._LangPatchScope()


interpreter._patch_lang_tensor = _patch_for_numpy_2_4
interpreter._patch_lang = _patch_once


@pytest.mark.parametrize("k", [1, 7, 40, 2999])
def test_choice_of_columns(k):
    """The k largest maxima, of equal ones the lowest column: as selection does."""
    from xtoken_core.losses.kernels.choose import largest_columns

    partial = torch.randn(2, 3, 3000, generator=torch.Generator().manual_seed(k))
    partial = torch.where(partial.abs() < 2, (2 * partial).round() / 2, partial)  # many ties, and both zeros
    partial[1, :, ::3] = -torch.inf
    columns, place = largest_columns(partial, k)
    assert torch.equal(columns.long(), selection.largest_columns(partial.amax(1), k))
    assert torch.equal(place.gather(1, columns.long()), torch.arange(k, dtype=torch.int32).expand(2, k))
    assert (place >= 0).sum() == 2 * k


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_plain_path(name):
    compare(CASES[name], torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "name",
    ["hidden_p_kl", "hidden_late", "hidden_gold", "hidden_several", "hidden_partition", "hidden_two_partitions", "hidden_scored"],
)
def test_tiles_change_nothing(name, monkeypatch):
    """Cut into tiles of a few rows, never through a chunk; cells of several segments."""
    from xtoken_core.losses.kernels import cell_masses, tiles

    monkeypatch.setattr(tiles, "TILE_ROWS", 5)
    monkeypatch.setattr(cell_masses, "FEW", 1)
    compare(CASES[name], torch.device("cpu"), torch.float32)
