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


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; `triton.cdiv` takes 10 microseconds."""
    return -(-a // b)


def _bare(arguments: tuple[Any, ...], kinds: list[Any], values: list[Any]) -> None:
    """Adds what Triton specialises on to `kinds`, and the arguments, with addresses in place of tensors, to `values`; tuples are followed."""
    aligned = 0  # a bit of each tensor
    for x in arguments:
        kind = type(x)
        if kind is int:
            kinds.append((x == 1) + 2 * (x & 15 == 0) + 4 * (x >> 31 != 0))
            values.append(x)
        elif isinstance(x, Tensor):
            address = x.data_ptr()
            aligned = 2 * aligned + (address & 15 == 0)
            kinds.append(x.dtype)
            values.append(address)
        elif isinstance(x, tuple):
            inner: list[Any] = []
            kinds.append(len(x))
            _bare(x, kinds, inner)
            values.append(tuple(inner))
        else:
            kinds.append(kind)
            values.append(x)
    kinds.append(aligned)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants): tensors, integers, floats, None, or tuples of them; then the constants, last in the kernel's signature."""
    if not isinstance(kernel, triton.runtime.JITFunction):  # Triton's interpreter
        kernel[grid](*arguments, num_warps=num_warps, **constants)
        return
    kinds: list[Any] = [id(kernel), num_warps, triton.runtime.driver.active.get_current_device(), *constants.values()]
    values: list[Any] = []
    _bare(arguments, kinds, values)
    key = tuple(kinds)
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[grid](*arguments, num_warps=num_warps, **constants)
    else:
        compiled[(*grid, 1, 1)[:3]](*values, *constants.values())
