"""Tensors handed from a teacher process to the student's without passing through a pipe.

The teacher writes into named buffers that both processes map: CUDA IPC memory on a GPU, anonymous shared memory on a
CPU. A buffer is allocated once and only grows. Its handle crosses the pipe when it is new or has grown; in every other
step nothing but the shapes does. No buffer has a name in a file system, so none can be left behind in /dev/shm.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class MemoryFile:
    """Handle of shared CPU memory: an anonymous file of the process that allocated it."""

    path: str
    size: int


Handle = Tensor | MemoryFile
"""What crosses the pipe. torch.multiprocessing pickles a CUDA tensor as its CUDA IPC handle."""


def _allocate(size: int, device: torch.device) -> tuple[Tensor, Handle]:
    """`size` bytes of memory that another process can map, as uint8 [size], and their handle."""
    if device.type == "cuda":
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        return memory, memory
    if not hasattr(os, "memfd_create"):  # no Linux
        memory = torch.empty(size, dtype=torch.uint8).share_memory_()
        return memory, memory
    # /dev/shm, which torch's own CPU sharing uses, is 64 MiB in a container; anonymous memory has no such limit
    descriptor = os.memfd_create("xtoken")
    os.ftruncate(descriptor, size)
    handle = MemoryFile(f"/proc/{os.getpid()}/fd/{descriptor}", size)
    return _open(handle), handle


def _open(handle: Handle) -> Tensor:
    """Maps a buffer into this process: uint8 [size]."""
    if isinstance(handle, Tensor):
        return handle
    return torch.from_file(handle.path, shared=True, size=handle.size, dtype=torch.uint8)


def _views(memory: Tensor, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of the given shapes, one behind the other in the buffer."""
    sizes = [prod(shape) * dtype.itemsize for shape in shapes]
    return [part.view(dtype).view(shape) for part, shape in zip(memory[: sum(sizes)].split(sizes), shapes)]


def remove_traces(pid: int) -> None:
    """Removes what a process that shared CUDA memory leaves in /dev/shm when it ends: the driver's file, torch's counters if it was killed."""
    for pattern in (f"cuda.shm.*.{pid:x}.*", f"torch_{pid}_*"):
        for left in glob.glob(f"/dev/shm/{pattern}"):
            with contextlib.suppress(OSError):
                os.unlink(left)


class Outbox:
    """The teacher's end: the buffers it writes into."""

    def __init__(self, device: torch.device):
        self._device = device
        self._memory: dict[str, Tensor] = {}
        self._handles: dict[str, Handle] = {}
        self._unannounced: set[str] = set()

    def tensors(self, name: str, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
        """Tensors to write into, in buffer `name`, which grows where they do not fit. Contents are undefined."""
        needed = sum(prod(shape) for shape in shapes) * dtype.itemsize
        if name not in self._memory or len(self._memory[name]) < needed:
            self._drop(name)
            self._memory[name], self._handles[name] = _allocate(max(needed, 1), self._device)
            self._unannounced.add(name)
        return _views(self._memory[name], shapes, dtype)

    def announce(self) -> dict[str, Handle]:
        """Handles of the buffers that are new or have grown since the last call."""
        fresh = {name: self._handles[name] for name in self._unannounced}
        self._unannounced.clear()
        return fresh

    def _drop(self, name: str) -> None:
        self._memory.pop(name, None)
        handle = self._handles.pop(name, None)
        if isinstance(handle, MemoryFile):
            os.close(int(handle.path.rsplit("/", 1)[1]))  # the student has mapped it long since


class Inbox:
    """The student's end: the teacher's buffers, mapped into this process."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def receive(self, handles: dict[str, Handle]) -> None:
        """Maps new and grown buffers; a grown one replaces its predecessor."""
        for name, handle in handles.items():
            self._memory.pop(name, None)
            self._memory[name] = _open(handle)

    def tensors(self, name: str, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
        """Views of what the teacher wrote with the same arguments; valid until the teacher's next run."""
        return _views(self._memory[name], shapes, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers together."""
        return sum(len(memory) for memory in self._memory.values())

    def close(self) -> None:
        """Unmaps all buffers."""
        self._memory.clear()
