"""What a teacher process is told and what crosses its pipe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xtoken_core.errors import RunError
from xtoken_core.losses.logits import HiddenLogits, TopKLogits
from xtoken_core.spec import LossSpec

Logits = Tensor | HiddenLogits | TopKLogits

Inputs = dict[str, np.ndarray]
"""One micro-batch of a teacher: input_ids [R, L], and of packed rows position_ids [R, L]. For scores also sample_mask [B],
scored_input_ids, scored_token_mask and scored_token_bytes [B, T], and of packed rows gather [B, T]: where in R * L each token lies."""


@dataclass(frozen=True)
class Shards:
    """The process group of one teacher's processes, one on each rank: each holds a share of the weights (FSDP2)."""

    address: str
    """Where they meet: `file://PATH` on one host, `tcp://HOST:PORT` on several."""
    rank: int
    size: int


@dataclass(frozen=True)
class TeacherSetup:
    """Everything a teacher process needs to begin."""

    name: str
    """As errors call it: `teachers.0 (qwen)`."""
    model: str
    num_ids: int
    """Ids of its tokenizer, or the fewer that the student of the same vocabulary has rows for; the lm_head's rows beyond are dropped."""
    min_rows: int
    """Rows that its lm_head must have (`TokenTable.min_rows`)."""
    transport: str
    top_k: int | None
    residency: str
    dtype: torch.dtype
    attention: str
    device: torch.device
    threads: int
    fp8: bool = False
    """Whether the products of its layers are formed in 8 bits."""
    compile: bool = False
    """Whether torch.compile makes its layers faster."""
    packed: bool = False
    """Whether its rows hold several documents."""
    timeout: float = 600.0
    """Seconds without a sign of life after which it counts as hanging."""
    shards: Shards | None = None
    """Set where the weights are spread over the teachers of all ranks."""
    scores: LossSpec | None = None
    """Set where the loss weights or selects teachers: what to score the teacher by."""


class TeacherError(RunError):
    """A teacher process failed or died; the message holds its last words."""
