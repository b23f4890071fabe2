"""A spec's teachers, made ready for training."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xtoken_core.configs import compute_dtype, weight_bytes
from xtoken_core.data.batch import Side
from xtoken_core.errors import InputError
from xtoken_core.losses import TeacherBatch
from xtoken_core.losses.learnable import LearnableProjection
from xtoken_core.losses.logits import as_form
from xtoken_core.losses.scores import score_metric
from xtoken_core.models import Loaded
from xtoken_core.projection import Projection
from xtoken_core.spec import DistillationSpec, TeacherSpec
from xtoken_core.teachers.setup import Logits, Shards, TeacherSetup
from xtoken_core.tokenization import TokenTable, load_tokenizer
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.training.ranks import MEETING
from xtoken_core.training.settings import training_loss

LARGEST_SHARE = 0.6
"""Of a GPU's memory: a teacher whose weights take more is sharded over ranks, where there are several."""


@dataclass(frozen=True)
class ReadyTeacher:
    """What is fixed of one teacher for a whole training; `batch` adds what changes with every micro-batch."""

    id: str
    setup: TeacherSetup | None
    """Of its process; None: its scores are read."""
    fingerprint: str
    """Of its vocabulary."""
    weight: float = 1.0
    mode: str | None = None
    """None: the student's vocabulary."""
    projection: Projection | None = None
    """W as the step before has made it, on the device."""
    learnable: LearnableProjection | None = None
    """W where its weights are trained with the student."""
    learning_rate: float = 0.0
    """Of `learnable`."""
    lead: float | None = None
    """Share of the student's bits per byte by which it must be ahead where it is heard; None: it is heard everywhere."""
    measured: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Nats and bytes of validation rows by domain, of one whose scores are read."""

    def batch(self, logits: Logits, side: Side, taught: Tensor | None = None) -> TeacherBatch:
        """This teacher's view of a micro-batch.

        logits: what its process handed over of `side`, or what was stored of its documents. taught: see `Batch`.
        """
        chunks = {} if side.chunks is None else vars(side.chunks)
        form = as_form(logits) if self.setup is None else as_form(logits).over_positions(side.unpacked)
        return TeacherBatch(
            logits=form,
            input_ids=side.input_ids,
            token_mask=side.token_mask,
            token_bytes=side.token_bytes,
            projection=self.projection,
            weight=self.weight,
            mode=self.mode,
            taught=taught,
            **chunks,
        )

    def save_learned(self, folder: Path, student: TokenTable, log_weights: Tensor) -> None:
        """Saves W with trained `log_weights` (on the CPU) as a projection, to `folder/projection-ID.safetensors`."""
        assert self.projection is not None
        learned = LearnableProjection(self.projection.to(torch.device("cpu")))
        learned.log_weights.data = log_weights
        name = folder / f"projection-{self.id}.safetensors"
        learned.projection().save(name, student.fingerprint, self.fingerprint, {"learned": True})


def ready_teachers(
    spec: DistillationSpec, inputs: TrainingInputs, student: Loaded, device: torch.device
) -> tuple[ReadyTeacher, ...]:
    """Loads what training knows of the teachers before their processes start: vocabulary, W, mode. Raises InputError.

    All ranks call it.
    """
    return tuple(
        _ready(spec, f"teachers.{index} ({teacher.id})", teacher, inputs, student, device)
        for index, teacher in enumerate(spec.teachers)
    )


def _ready(
    spec: DistillationSpec, name: str, teacher: TeacherSpec, inputs: TrainingInputs, student: Loaded, device: torch.device
) -> ReadyTeacher:
    weight = teacher.weight if spec.fixed_weights else 1.0
    if teacher.projection is None:
        scored = teacher.scores is not None
        setup = None if scored else _setup(spec, name, teacher, student.rows, student.table.min_rows, device)
        return ReadyTeacher(teacher.id, setup, student.table.fingerprint, weight, lead=_lead(spec, teacher))
    if teacher.id not in inputs.projections:
        raise InputError(f"{name}: projection: none was given")
    table = TokenTable.from_tokenizer(load_tokenizer(teacher.model, teacher.tokenizer))
    projection = Projection.load(inputs.projections[teacher.id], student.table, table)
    mode = _mode(spec, name, teacher, inputs.modes)
    return ReadyTeacher(
        id=teacher.id,
        setup=None if teacher.scores is not None else _setup(spec, name, teacher, len(table), table.min_rows, device),
        fingerprint=table.fingerprint,
        weight=weight,
        mode=mode,
        projection=projection.to(device),
        learnable=LearnableProjection(projection) if teacher.projection.learnable else None,
        learning_rate=teacher.projection.learning_rate,
        lead=_lead(spec, teacher),
    )


def _lead(spec: DistillationSpec, teacher: TeacherSpec) -> float | None:
    """By how much it must be ahead where it is heard; None where that is not asked: what weighs teachers by a metric decides alone."""
    whole = teacher.transport != "topk"  # else the probabilities of the text are not handed over
    return teacher.lead if whole and spec.loss.separate_terms and spec.data.validation else None


def _mode(spec: DistillationSpec, name: str, teacher: TeacherSpec, chosen: Mapping[str, str]) -> str:
    """The loss mode of a cross-tokenizer teacher: its own, the loss's, or where that is `auto` the one chosen for it."""
    assert teacher.projection is not None
    mode = teacher.mode or (chosen.get(teacher.id) if spec.loss.mode == "auto" else spec.loss.mode)
    if mode is None:
        raise InputError(f"{name}: mode: auto, and the overlap step's choice was not given")
    if teacher.projection.learnable and mode != "p_kl":
        raise InputError(f"{name}: projection.learnable: the overlap step chose {mode}, which does not train W; set mode: p_kl")
    return mode


def _setup(
    spec: DistillationSpec, name: str, teacher: TeacherSpec, num_ids: int, min_rows: int, device: torch.device
) -> TeacherSetup:
    scored = score_metric(spec.loss) is not None
    dtype = compute_dtype(spec.training.precision) if teacher.precision == "auto" else torch.bfloat16
    shards = _shards(teacher.model, dtype, device)
    if shards is not None and teacher.precision == "fp8":
        raise InputError(
            f"{name}: precision: fp8: it does not fit one GPU, and one that is spread over several runs in bf16 only"
        )
    return TeacherSetup(
        name=name,
        model=teacher.model,
        num_ids=num_ids,
        min_rows=min_rows,
        transport=teacher.transport,
        top_k=teacher.top_k,
        residency=teacher.residency,
        dtype=dtype,
        fp8=teacher.precision == "fp8",
        attention=spec.training.attention,
        device=device,
        threads=torch.get_num_threads(),
        compile=spec.training.compile and device.type == "cuda",
        packed=spec.data.packing,
        timeout=spec.training.timeout,
        shards=shards,
        scores=training_loss(spec, baseline=False) if scored else None,
    )


def sharers(needed: int, room: float, per_host: int, ranks: int) -> int:
    """How many ranks share weights of `needed` bytes, where each has `room`: none others (1), those of a host, or all.

    The fewest that can: a forward pass gathers every layer from all of them, and between hosts that is slow.
    """
    return next((count for count in (1, per_host) if needed <= room * count), ranks)


def _shards(model: str, dtype: torch.dtype, device: torch.device) -> Shards | None:
    """A meeting point for the teacher's processes on several ranks, if the model is too large for one GPU. All ranks call it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or device.type != "cuda":
        return None
    room = LARGEST_SHARE * torch.cuda.get_device_properties(device).total_memory
    size = sharers(weight_bytes(model, dtype), room, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)), ranks)
    if size == 1:
        return None
    places: list[Any] = [None] * ranks
    dist.all_gather_object(places, _meeting_place(several_hosts=size > int(os.environ.get("LOCAL_WORLD_SIZE", ranks))))
    rank = dist.get_rank()
    first = rank // size * size  # torchrun numbers the ranks host by host
    return Shards(places[first], rank - first, size)


def _meeting_place(several_hosts: bool) -> str:
    """Where others may find this rank: at a port, where they are on several hosts; else in a file, which nobody else can reach."""
    if several_hosts:
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{os.environ['MASTER_ADDR']}:{free.getsockname()[1]}"
    folder = tempfile.mkdtemp(prefix="xtoken-teacher-", dir=os.environ.get(MEETING))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return f"file://{folder}/group"
