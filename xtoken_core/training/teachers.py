"""A spec's teachers, made ready for training."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from xtoken_core.errors import InputError
from xtoken_core.losses import TeacherBatch
from xtoken_core.losses.learnable import LearnableProjection
from xtoken_core.models import weight_bytes
from xtoken_core.projection import Projection
from xtoken_core.spec import DistillationSpec
from xtoken_core.teachers.setup import Shards, TeacherSetup
from xtoken_core.tokenization import TokenTable, load_tokenizer
from xtoken_core.training.settings import compute_dtype, training_loss

LARGEST_SHARE = 0.6
"""Of a GPU's memory: a teacher whose weights take more is sharded over the ranks, where there are several."""


@dataclass(frozen=True)
class ReadyTeacher:
    """One teacher, made ready from the spec."""

    setup: TeacherSetup
    template: TeacherBatch
    fingerprint: str
    projection: Projection | None
    learnable: LearnableProjection | None


def ready_teacher(
    spec: DistillationSpec,
    index: int,
    modes: dict[str, str],
    student: TokenTable,
    student_rows: int,
    path: str | Path | None,
    device: torch.device,
) -> ReadyTeacher:
    """Loads what training knows of teacher `index` before its process starts: vocabulary, W, mode. Raises InputError."""
    teacher, training = spec.teachers[index], spec.training
    name = f"teachers.{index} ({teacher.id})"
    table, projection, learnable, mode = student, None, None, None
    if teacher.projection is not None:
        if path is None:
            raise InputError(f"{name}: projection: none was given")
        table = TokenTable.from_tokenizer(load_tokenizer(teacher.model, teacher.tokenizer))
        projection = Projection.load(path, student, table)
        mode = teacher.mode or (modes.get(teacher.id) if spec.loss.mode == "auto" else spec.loss.mode)
        if mode is None:
            raise InputError(f"{name}: mode: auto, and the overlap step's choice was not given")
        if teacher.projection.learnable:
            if mode != "p_kl":
                raise InputError(
                    f"{name}: projection.learnable: the overlap step chose {mode}, which does not train W; set mode: p_kl"
                )
            learnable = LearnableProjection(projection)
    scored = spec.loss.weight_metric is not None or spec.loss.aggregation == "select_teacher"
    dtype = compute_dtype(training.precision)
    setup = TeacherSetup(
        name=name,
        model=teacher.model,
        num_ids=len(table) if teacher.cross_tokenizer else student_rows,
        min_rows=table.min_rows,
        transport=teacher.transport,
        top_k=teacher.top_k,
        residency=teacher.residency,
        dtype=dtype,
        attention=training.attention,
        device=device,
        threads=torch.get_num_threads(),
        packed=spec.data.packing,
        shards=_shards(teacher.model, dtype, device),
        scores=training_loss(spec, baseline=False) if scored else None,
    )
    on_device = None if projection is None else projection.to(device)
    weight = teacher.weight if spec.fixed_weights else 1.0
    template = TeacherBatch(logits=torch.empty(0), projection=on_device, weight=weight, mode=mode)
    return ReadyTeacher(setup, template, table.fingerprint, projection, learnable)


def _shards(model: str, dtype: torch.dtype, device: torch.device) -> Shards | None:
    """A meeting point for the teacher's processes on all ranks, if the model is too large for one GPU. All ranks call it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or device.type != "cuda":
        return None
    if weight_bytes(model, dtype) <= LARGEST_SHARE * torch.cuda.get_device_properties(device).total_memory:
        return None
    with socket.socket() as free:
        free.bind(("", 0))
        address = [f"{os.environ['MASTER_ADDR']}:{free.getsockname()[1]}"]
    dist.broadcast_object_list(address, src=0)
    return Shards(address[0], dist.get_rank(), ranks)
