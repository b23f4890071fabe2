"""Launching by bare addresses: a compiled kernel is reused just where Triton would reuse it. What compiles is a recorder, in the last test Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

launching = pytest.importorskip("xtoken_core.losses.kernels.launch", reason="Triton is not installed")


class Recorder:
    """In place of a kernel: notes calls that compile, and calls of what was compiled."""

    def __init__(self):
        self.compiled, self.reused = [], []

    def __getitem__(self, grid):
        def compiling(*arguments, num_warps, **constants):
            self.compiled.append((grid, arguments, num_warps, constants))
            return self

        return compiling if len(self.compiled) == self.expected else lambda *values: self.reused.append((grid, values))


@pytest.fixture
def kernel(monkeypatch):
    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    monkeypatch.setattr(launching, "triton", SimpleNamespace(runtime=SimpleNamespace(JITFunction=Recorder, driver=driver)))
    return Recorder()


BASE = (torch.zeros(64), 5, None, 1.5, (torch.zeros(64, dtype=torch.int32), (7, 3)))


def changed(position, value):
    return (*BASE[:position], value, *BASE[position + 1 :])


def launch(kernel, arguments, expected, grid=(4, 2), warps=8, **constants):
    """`expected`: how often the kernel has been compiled before, if this launch compiles."""
    kernel.expected = expected
    launching.launch(kernel, grid, *arguments, num_warps=warps, **(constants or {"SIZE": 1}))


def test_the_same_kinds_are_launched_with_addresses(kernel):
    launch(kernel, BASE, 0)
    other = torch.ones(128), 6, None, 2.5, (torch.ones(9, dtype=torch.int32), (9, 11))
    launch(kernel, other, -1, grid=(3,))
    assert len(kernel.compiled) == 1
    tensor, _, _, _, (inner, _) = other
    assert kernel.reused == [((3, 1, 1), (tensor.data_ptr(), 6, None, 2.5, (inner.data_ptr(), (9, 11)), 1))]


@pytest.mark.parametrize(
    "arguments",
    [
        changed(0, torch.zeros(65)[1:]),
        changed(0, torch.zeros(64, dtype=torch.float64)),
        changed(1, 16),
        changed(1, 1),
        changed(1, 2**40),
        changed(2, torch.zeros(64)),
        changed(3, None),
        changed(4, (BASE[4][0][1:], (7, 3))),
        changed(4, (BASE[4][0], (7, 32))),
        changed(4, (BASE[4][0], (7, 3, 3))),
        changed(4, (BASE[4][0], 7, 3)),
    ],
    ids=[
        "unaligned",
        "dtype",
        "multiple of 16",
        "one",
        "64 bits",
        "given",
        "left out",
        "inner unaligned",
        "inner multiple",
        "longer",
        "flat",
    ],
)
def test_other_kinds_are_compiled_anew(kernel, arguments):
    launch(kernel, BASE, 0)
    launch(kernel, arguments, 1)
    assert len(kernel.compiled) == 2 and not kernel.reused


def test_constants_and_warps_are_part_of_the_kind(kernel):
    launch(kernel, BASE, 0)
    launch(kernel, BASE, 1, SIZE=2)
    launch(kernel, BASE, 2, warps=4)
    assert [(warps, constants) for _, _, warps, constants in kernel.compiled] == [
        (8, {"SIZE": 1}),
        (8, {"SIZE": 2}),
        (4, {"SIZE": 1}),
    ]


@pytest.mark.slow
def test_kernels_compile_for_an_h100(pytestconfig):
    """In a process of its own, since this one may have Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cache = pytestconfig.cache.mkdir("triton")  # keyed by the kernels' sources: what has not changed is compiled once
    command = [sys.executable, "-m", "tests.support.kernel_compile", "p_kl", "same", "gold", "hidden_several", "hidden_partition"]
    done = subprocess.run(command, env=environment | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 30
