"""The kernels' logic on a CPU, through Triton's interpreter, against the plain path."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if torch.cuda.is_available():
    pytest.skip("a GPU is here: tests/gpu runs the kernels themselves", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from tests.support import kernel_cases  # noqa: E402
from tests.support.kernel_cases import CASES, Case, build, compare  # noqa: E402
from xtoken_core.losses import selection  # noqa: E402
from xtoken_core.losses.types import StudentBatch  # noqa: E402
from xtoken_core.partition import Partition  # noqa: E402

pytestmark = pytest.mark.slow

_patch, _patch_all, _dtype_of = interpreter._patch_lang_tensor, interpreter._patch_lang, interpreter._get_np_dtype
_dtype_once = cache(_dtype_of)


def _patch_for_numpy_2_4(tensor, scope):
    """NumPy 2.4 no longer turns an array of one element into an integer, which Triton 3.6's interpreter relies on for loop bounds."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))


def _patch_once(fn):
    """Every function that a kernel calls would replace the whole language again: a third of the time."""
    needed = any(value is lang and tl.core.is_builtin(lang.load) for lang in (tl, tl.core) for value in fn.__globals__.values())
    return _patch_all(fn) if needed else interpreter._LangPatchScope()


def _dtype(dtype):
    """It makes a table of them all at each call; pointers are not hashable."""
    return _dtype_of(dtype) if dtype.scalar.is_ptr() else _dtype_once(dtype.scalar)


interpreter._patch_lang_tensor = _patch_for_numpy_2_4
interpreter._patch_lang = _patch_once
interpreter._get_np_dtype = _dtype
# They would be a third of the time, and serve assertions that only `debug` has, on a GPU too.
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


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
    """Cut into tiles of a few rows, never through a chunk; every cell of several tokens by itself."""
    from xtoken_core.losses.kernels import cell_masses, tiles

    monkeypatch.setattr(tiles, "TILE_ROWS", 5)
    monkeypatch.setattr(cell_masses, "FEW", 1)
    compare(CASES[name], torch.device("cpu"), torch.float32)


class Waits(TorchDispatchMode):
    """Notes the operations whose answer, or the size of it, a GPU's host has to wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.overloadpacket.__name__
        indices = arguments[1] if name in ("index", "index_put", "index_put_") else []
        chosen = any(x is not None and x.dtype == torch.bool for x in indices)
        if chosen or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave"):
            self.found.append(name)
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["hidden_partition", "hidden_scored"])
def test_partition_kl_waits_for_nothing(name):
    """Once its tables are made."""
    from xtoken_core.losses.kernels.partition import Wanted, run

    student, ids, mask, samples, teachers, spec, _ = build(CASES[name])
    student = StudentBatch(student.over_positions(Tensor.float), ids, mask, samples)
    teacher = replace(teachers[0], logits=teachers[0].logits.over_positions(lambda x: x.float() if x.is_floating_point() else x))
    wanted = Wanted(True, torch.tensor(0.5), torch.tensor(1.0))
    first, _ = run(student, teacher, spec, wanted)
    with Waits() as waits:
        again, _ = run(student, teacher, spec, wanted)
    assert torch.equal(first, again) and not waits.found


@pytest.mark.parametrize("name", ["hidden_partition", "hidden_scored"])
def test_masses_at_the_floor(name, monkeypatch):
    """Probabilities far below 2^-126 on either side."""
    student, *rest, teachers, spec, coefficients = build(CASES[name])
    teachers = [t if name == "hidden_scored" else replace(t, logits=t.logits.over_positions(lambda x: 12 * x)) for t in teachers]
    student = student.over_positions(lambda x: 20 * x)
    monkeypatch.setattr(kernel_cases, "build", lambda _: (student, *rest, teachers, spec, coefficients))
    compare(CASES[name], torch.device("cpu"), torch.float32)


def test_shares_near_one():
    """A chunk that is nearly all of its cell: the logs of what is left of the cell are of small differences."""
    case = Case(("partition_kl", "scored"), length=20, vocab=5, hidden=True, coefficients=True, seed=1417)
    compare(case, torch.device("cpu"), torch.float32)


def _without_chunks(teacher):
    outside = {side: torch.full_like(getattr(teacher, side), -1) for side in ("student_chunk_id", "teacher_chunk_id")}
    return replace(teacher, **outside, chunk_valid=teacher.chunk_valid[:, :0], chunk_exact=teacher.chunk_exact[:, :0])


def _of_cells(make):
    """The same teacher with cells that `make` gives of the two vocabularies' cells."""

    def changed(teacher):
        cells = make(teacher.projection.cells)
        return replace(teacher, projection=replace(teacher.projection, cells=cells, tables={}))

    return changed


EDGES = {
    "no chunks": _without_chunks,
    "cells of the teacher only": _of_cells(lambda c: Partition(c.student.where(c.student > 3, -1), c.teacher, c.num_cells)),
    "cells of the student only": _of_cells(lambda c: Partition(c.student, c.teacher.where(c.teacher > 3, -1), c.num_cells)),
    "one cell": _of_cells(lambda c: Partition(c.student.clamp(max=0), c.teacher.clamp(max=0), 1)),
    "cells of one token": _of_cells(
        lambda c: Partition(torch.arange(len(c.student)), torch.arange(len(c.teacher)), len(c.teacher))
    ),
}


@pytest.mark.parametrize("edge", EDGES)
def test_partitions_at_the_edges(edge, monkeypatch):
    student, ids, mask, samples, [teacher], *rest = build(CASES["hidden_partition"])
    monkeypatch.setattr(kernel_cases, "build", lambda _: (student, ids, mask, samples, [EDGES[edge](teacher)], *rest))
    compare(CASES["hidden_partition"], torch.device("cpu"), torch.float32)


def _lifted(logits, token, by):
    """The same with the logit of a token so much higher in every row."""
    one = torch.ones_like(logits.hidden[..., :1])
    column = torch.zeros_like(logits.weight[:, :1]).index_fill(0, torch.tensor([token]), by)
    return replace(logits, hidden=torch.cat([logits.hidden, one], -1), weight=torch.cat([logits.weight, column], -1))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_token_in_no_cell_takes_all_probability(side, monkeypatch):
    """The masses of all cells together are below the smallest number then."""
    student, ids, mask, samples, [teacher], *rest = build(CASES["hidden_partition"])
    cells = teacher.projection.cells
    without = Partition(*(x.index_fill(0, torch.tensor([5]), -1) for x in (cells.student, cells.teacher)), cells.num_cells)
    teacher = replace(teacher, projection=replace(teacher.projection, cells=without, tables={}))
    if side == "student":
        student = _lifted(student, 5, 150.0)
    else:
        teacher = replace(teacher, logits=_lifted(teacher.logits, 5, 150.0))
    monkeypatch.setattr(kernel_cases, "build", lambda _: (student, ids, mask, samples, [teacher], *rest))
    compare(CASES["hidden_partition"], torch.device("cpu"), torch.float32)
