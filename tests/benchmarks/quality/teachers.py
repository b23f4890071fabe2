"""Teachers of the lab: their final hidden states over fixed rows, computed once by all workers together and read by every arm."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.benchmarks.quality.arms import Arm, Setting
from tests.benchmarks.quality.rows import Rows
from xtoken_core.losses import CellCut, HiddenLogits, TeacherBatch
from xtoken_core.models import final_hidden, head_logits, load_model
from xtoken_core.projection import Projection
from xtoken_core.teachers.fp8 import to_fp8

PART = 400
"""Rows that one worker computes at a time."""


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher whose hidden states are there."""

    number: int
    """Among the teachers of its setting."""
    columns: int
    """Number of its columns in the rows."""
    states: Tensor
    """[rows, T, D] in a file that every worker maps; its first `count` rows are there."""
    count: int
    head: HiddenLogits
    """Its lm_head; its own hidden states are empty."""
    projection: Projection | None
    projection_file: str | None
    tokens_per_second: float
    """Of its forward pass, as far as this worker ran it."""
    cut: CellCut | None = None
    """What is left of its cells; None: all."""

    def read(self, index: Tensor) -> Tensor:
        """[n, T, D]: the hidden states of some rows, in page-locked memory where there is a GPU."""
        found = torch.empty(len(index), *self.states.shape[1:], dtype=self.states.dtype, pin_memory=self.head.weight.is_cuda)
        return torch.index_select(self.states, 0, index, out=found)

    def batch(self, rows: Rows, index: Tensor, hidden: Tensor, arm: Arm, silent: bool = False) -> TeacherBatch:
        """What the loss reads of this teacher for some rows; silent: it teaches none of them."""
        fields = rows.teacher_fields(self.columns, index)
        if arm.variant == "first_row":
            fields["chunk_exact"] = torch.zeros_like(fields["chunk_exact"])
        domain = None if arm.domains is None else arm.domains[self.number]
        if domain is not None:
            fields["taught"] = (rows.arrays["domain"][index] == domain) & (not silent)
        mode = arm.spec().mode if self.projection else None
        logits = replace(self.head, hidden=hidden)
        heard = logits if self.cut is None else self.cut(logits, fields["input_ids"])
        return TeacherBatch(heard, projection=self.projection, mode=mode, **fields)

    def of(self, arm: Arm) -> CachedTeacher:
        """The same as an arm hears it."""
        teacher = self
        if arm.cells is not None:
            assert self.projection is not None and self.projection.cells is not None
            cut = CellCut.of(self.projection.cells, len(self.head.weight), arm.cells, arm.spec().temperature)
            teacher = replace(teacher, cut=cut)
        if arm.variant == "joined":
            assert self.projection_file is not None
            file = Path(self.projection_file)
            joined = Projection.load(str(file.with_name(file.name.replace("w-", "joined-"))))
            return replace(teacher, projection=joined.to(self.head.weight.device))
        return teacher


def feed(
    teachers: Mapping[int, CachedTeacher], order: Sequence[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Each step's rows and the hidden states of every teacher over them, read one step ahead. order: on the CPU."""

    def read(index: Tensor) -> dict[int, Tensor]:
        return {n: teacher.read(index) for n, teacher in teachers.items()}

    begin = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())  # a thread begins on device 0
    with ThreadPoolExecutor(1, "reader", *begin) as reader:
        ahead = reader.submit(read, order[0])
        for step, index in enumerate(order):
            hidden = ahead.result()
            if step + 1 < len(order):
                ahead = reader.submit(read, order[step + 1])
            yield index.to(device), {n: states.to(device, non_blocking=True) for n, states in hidden.items()}


def claim(path: Path) -> bool:
    """Whether nobody has claimed this piece of work before; from now on it is this process's."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.write(file, str(os.getpid()).encode())
    os.close(file)
    return True


def cached_teacher(setting: Setting, number: int, rows: Rows, count: int, shared: Path, device: torch.device) -> CachedTeacher:
    """Teacher `number` of a setting, with hidden states over the first `count` rows; those that others compute meanwhile are waited for."""
    teacher = setting.teachers[number]
    columns = number if teacher.columns is None else teacher.columns
    folder = shared / f"hidden-{Path(teacher.model).name}-{teacher.precision}-{Path(setting.data).name}"
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(teacher.model, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
    if teacher.precision == "fp8":
        to_fp8(model, device, teacher.model)
    width = model.config.get_text_config().hidden_size
    shape = (len(rows), rows.teacher_ids(columns, torch.arange(1, device=device)).shape[1], width)
    size = shape[0] * shape[1] * shape[2]
    states = torch.from_file(str(folder / "states.bin"), shared=True, size=size, dtype=model.dtype).view(shape)
    parts = range(0, count, PART)
    tokens, seconds = 0, 0.0
    for start in parts:
        if claim(folder / f"{start}.claim"):
            index = torch.arange(start, min(start + PART, len(rows)), device=device)
            started = time.monotonic()
            _fill(states[start : start + PART], model, rows.teacher_ids(columns, index))
            seconds += time.monotonic() - started
            tokens += int(rows.attention(columns, index).sum())
            (folder / f"{start}.done").touch()
    projection = None if teacher.projection is None else Projection.load(teacher.projection)
    known = None if projection is None else projection.teacher_vocab_size
    head = head_logits(
        model, torch.empty(0, device=device), known or setting.vocabulary or model.config.get_text_config().vocab_size
    )
    head = replace(head, weight=head.weight.detach().clone())
    del model
    while not all((folder / f"{start}.done").exists() for start in parts):
        time.sleep(0.2)
    projection = None if projection is None else projection.to(device)
    return CachedTeacher(number, columns, states, count, head, projection, teacher.projection, tokens / max(seconds, 1e-9))


@torch.no_grad()
def _fill(states: Tensor, model: PreTrainedModel, ids: Tensor) -> None:
    """Writes the final hidden states of rows, 32 at a time."""
    for place, batch in zip(states.split(32), ids.split(32)):
        place.copy_(final_hidden(model, batch))
