"""`python -m tests.support.kernel_compile [CASE ...]`: compiles for an H100, without one, every kernel that cases launch in bfloat16.

Triton's own front end, specialisation and ptxas run; nothing is launched. Fails as well where `launch` would take a compiled kernel again
that Triton would not. Prints how many were compiled.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.support.kernel_cases import CASES, evaluate

HOPPER = GPUTarget("cuda", 90, 32)


class SameAsTriton(dict):
    """In place of the kernels that `launch` keeps: none is found, so that Triton is asked every time, and its answer must be the one before."""

    def get(self, key):
        return None

    def __setitem__(self, key, compiled):
        if key in self and self[key] is not compiled:
            raise AssertionError(f"launch would take {self[key].name} for what Triton compiles anew: {key}")
        super().__setitem__(key, compiled)


def compile_cases(names: list[str]) -> int:
    """How many kernels the cases needed, each compiled to a cubin for HOPPER."""
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: HOPPER)
    triton.runtime.driver.set_active(driver)
    run = triton.runtime.JITFunction.run
    triton.runtime.JITFunction.run = lambda self, *args, grid, warmup, **kwargs: run(
        self, *args, grid=grid, warmup=True, **kwargs
    )
    torch.empty = torch.zeros  # no kernel fills it, and PyTorch takes some of it for indices
    from xtoken_core.losses.kernels import launch, term_sums

    launch._COMPILED = SameAsTriton()
    for name in names:
        evaluate(term_sums, CASES[name], torch.device("cpu"), torch.bfloat16)
    assert all(compiled.asm["cubin"] for compiled in launch._COMPILED.values())
    return len(launch._COMPILED)


if __name__ == "__main__":
    print(compile_cases(sys.argv[1:] or list(CASES)))
