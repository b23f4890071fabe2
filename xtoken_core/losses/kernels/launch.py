"""Launching a kernel at a fraction of what Triton's own launch costs the host.

`kernel[grid](...)` looks at every argument twice and asks the driver about every pointer, some 100 microseconds a launch on a slow host; a loss has
twenty launches, and all its work on the device takes two milliseconds. So compiled kernels are kept by what Triton specialises on (types,
whether pointers and integers are multiples of 16, ones, constants) and are launched with bare addresses.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

_COMPILED: dict[Any, Any] = {}


def _bare(arguments: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """What Triton specialises on, and the arguments with addresses in place of tensors; tuples are followed."""
    kinds: list[Any] = []
    values: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            kinds.append((x.dtype, address & 15 == 0))
            values.append(address)
        elif type(x) is int:
            kinds.append((x == 1, x & 15 == 0, x >> 31 != 0))
            values.append(x)
        elif isinstance(x, tuple):
            inner, bare = _bare(x)
            kinds.append(tuple(inner))
            values.append(tuple(bare))
        else:
            kinds.append(x is None)
            values.append(x)
    return kinds, values


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants): tensors, integers, floats, None, or tuples of them; then the constants, last in the kernel's signature."""
    if not isinstance(kernel, triton.runtime.JITFunction):  # Triton's interpreter
        kernel[grid](*arguments, num_warps=num_warps, **constants)
        return
    kinds, values = _bare(arguments)
    key = kernel, num_warps, triton.runtime.driver.active.get_current_device(), *constants.values(), *kinds
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[grid](*arguments, num_warps=num_warps, **constants)
    else:
        compiled[(*grid, 1, 1)[:3]](*values, *constants.values())
