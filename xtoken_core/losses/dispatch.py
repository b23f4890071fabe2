"""Which implementation of `term_sums` computes a batch: the Triton kernels on a CUDA device, plain PyTorch elsewhere."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from xtoken_core.losses import plain
from xtoken_core.losses.selection import chunk_rows, next_token_mask
from xtoken_core.losses.types import Coefficients, StudentBatch, TeacherBatch, TermSums
from xtoken_core.spec import LossSpec


@functools.cache
def _kernels() -> ModuleType | None:
    """The kernels, where Triton is installed (it comes with PyTorch for CUDA on Linux)."""
    if importlib.util.find_spec("triton") is None:
        return None
    from xtoken_core.losses import kernels

    return kernels


def term_sums(
    student: StudentBatch, teachers: Sequence[TeacherBatch], spec: LossSpec, coefficients: Coefficients | None = None
) -> TermSums:
    """See `plain.term_sums`. float64 logits always take the plain path: the kernels compute in float32."""
    logits = student.logits
    fast = _kernels() if logits.device.type == "cuda" and logits.dtype != torch.float64 else None
    return (fast or plain).term_sums(student, teachers, spec, coefficients)


def valid_chunks(teacher: TeacherBatch, sample_mask: Tensor, spec: LossSpec) -> Tensor:
    """0-dim int64: how many chunks of a cross-tokenizer teacher are valid; see `selection.chunk_rows`."""
    fast = _kernels() if sample_mask.device.type == "cuda" else None
    if teacher.mode == "partition_kl":
        spec = spec.model_copy(update={"chunk_distribution": "first"})
    return fast.valid_chunks(teacher, sample_mask, spec) if fast else chunk_rows(teacher, sample_mask, spec).valid.sum()


def counted_tokens(token_mask: Tensor, sample_mask: Tensor) -> Tensor:
    """0-dim float64: how many tokens count; see `selection.next_token_mask`."""
    fast = _kernels() if token_mask.device.type == "cuda" else None
    return fast.counted_tokens(token_mask, sample_mask) if fast else next_token_mask(token_mask, sample_mask).sum().double()
