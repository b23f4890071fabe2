"""Teachers of the lab: their final hidden states over fixed rows, computed once by all workers together and read by every arm."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.benchmarks.quality.arms import Setting
from tests.benchmarks.quality.rows import Rows
from xtoken_core.losses import HiddenLogits, TeacherBatch
from xtoken_core.models import final_hidden, head_logits, load_model
from xtoken_core.projection import Projection

PART = 800
"""Rows that one worker computes at a time."""


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher whose hidden states are there."""

    hidden: Tensor
    """[rows, T, D] on the device."""
    head: HiddenLogits
    """Its lm_head; its own hidden states are empty."""
    projection: Projection | None
    tokens_per_second: float
    """Of its forward pass."""

    def batch(self, rows: Rows, number: int, index: Tensor, mode: str | None, variant: str | None) -> TeacherBatch:
        """What the loss reads of teacher `number` for some rows."""
        fields = rows.teacher_fields(number, index)
        if variant == "first_row":
            fields["chunk_exact"] = torch.zeros_like(fields["chunk_exact"])
        return TeacherBatch(
            replace(self.head, hidden=self.hidden[index]),
            projection=self.projection,
            mode=mode if self.projection else None,
            **fields,
        )

    def reached(self) -> CachedTeacher:
        """The same with only the columns that W reaches."""
        assert self.projection is not None
        indices = self.projection.indices
        kept, number = indices[indices >= 0].unique(return_inverse=True)
        renumbered = indices.masked_scatter(indices >= 0, number)
        weight = self.head.weight[kept].contiguous()
        return replace(
            self,
            head=replace(self.head, weight=weight),
            projection=Projection(renumbered, self.projection.weights, len(kept), self.projection.exact),
        )


def claim(path: Path) -> bool:
    """Whether nobody has claimed this piece of work before; from now on it is the caller's."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def cached_teacher(setting: Setting, number: int, rows: Rows, shared: Path, device: torch.device) -> CachedTeacher:
    """Teacher `number` of a setting, its hidden states over `rows`; those that other workers compute meanwhile are waited for."""
    teacher = setting.teachers[number]
    folder = shared / f"hidden-{Path(teacher.model).stem}-{Path(setting.data).name}-{len(rows)}"
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(teacher.model, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
    parts = [torch.arange(n, min(n + PART, len(rows)), device=device) for n in range(0, len(rows), PART)]
    tokens, seconds = 0, 0.0
    for n, index in enumerate(parts):
        if claim(folder / f"{n}.claim"):
            started = time.monotonic()
            hidden = torch.cat(list(_forward(model, rows.teacher_ids(number, index))))
            seconds += time.monotonic() - started
            tokens += int(rows.attention(number, index).sum())
            save_file({"hidden": hidden}, folder / f"{n}.partial")
            (folder / f"{n}.partial").rename(folder / f"{n}.safetensors")
    projection = None if teacher.projection is None else Projection.load(teacher.projection)
    known = None if projection is None else projection.teacher_vocab_size
    head = head_logits(
        model, torch.empty(0, device=device), known or setting.vocabulary or model.config.get_text_config().vocab_size
    )
    head = replace(head, weight=head.weight.detach().clone())
    width, dtype = model.config.get_text_config().hidden_size, model.dtype
    del model
    everything = torch.empty(len(rows), rows.teacher_ids(number, parts[0][:1]).shape[1], width, dtype=dtype, device=device)
    for n, index in enumerate(parts):
        while not (path := folder / f"{n}.safetensors").exists():
            time.sleep(0.2)
        everything[index] = load_file(path)["hidden"].to(device)
    return CachedTeacher(everything, head, None if projection is None else projection.to(device), tokens / max(seconds, 1e-9))


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: Tensor) -> Iterator[Tensor]:
    """The final hidden states of rows, 32 at a time, on the CPU."""
    for batch in ids.split(32):
        yield final_hidden(model, batch).cpu()
