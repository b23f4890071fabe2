"""Distillation from a spec and its prepared inputs to a trained student on disk."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from xtoken_core.checksums import seal
from xtoken_core.compilations import keep_compilations
from xtoken_core.configs import head_rows, stored_dtype
from xtoken_core.data.batch import Collator
from xtoken_core.data.reading import load_rows, rows_of_shards
from xtoken_core.data.rows import teacher_column
from xtoken_core.errors import InputError
from xtoken_core.forking import start_server
from xtoken_core.models import Loaded
from xtoken_core.modes import NO_DISTANCES, WORSE_THAN_CE
from xtoken_core.results.training import TrainingSummary
from xtoken_core.spec import DistillationSpec
from xtoken_core.storage import local_copy
from xtoken_core.teachers.handle import TEACHERS_IMPORT
from xtoken_core.teachers.pool import TeacherPool
from xtoken_core.teachers.scores import ScoredTeacher
from xtoken_core.tokenization import load_tokenizer
from xtoken_core.training.checkpoints import (
    LEARNABLE_FILE,
    Progress,
    check_folder,
    check_inputs,
    checkpoint_of_step,
    clean_up,
    latest_checkpoint,
    load_progress,
    owned,
    restore,
    step_of,
    training_identity,
    twin_of,
)
from xtoken_core.training.environment import describe_environment
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.training.launch import on_every_gpu
from xtoken_core.training.log import RunLog
from xtoken_core.training.ranks import Watch
from xtoken_core.training.scored import check_classes, rows_check, scored_teachers, with_measurements
from xtoken_core.training.settings import rank_timeout, training_arguments, training_loss
from xtoken_core.training.sharding import check_optimizer
from xtoken_core.training.step import Teaching
from xtoken_core.training.student import Student, student_model
from xtoken_core.training.teachers import ReadyTeacher, ready_teachers
from xtoken_core.training.trackers import trackers
from xtoken_core.training.trainer import DistillationTrainer, RunRecord, TrainingData

logger = logging.getLogger(__name__)


def distill(
    spec: DistillationSpec,
    inputs: TrainingInputs,
    out_dir: str | Path,
    baseline: bool = False,
    checkpoint_uri: str | None = None,
) -> TrainingSummary:
    """Trains the student and returns the summary that it also writes.

    With several GPUs, one process per GPU is started, unless torchrun has done so already.

    Args:
        spec: read for student, teachers, loss, data and training.
        inputs: rows, and of each teacher W and the loss mode.
        out_dir: gets `last` and `best` (by validation bits per byte; folders that AutoModelForCausalLM and AutoTokenizer load), `log.jsonl`,
            `summary.json`, `tensorboard`, `checkpoints`.
        baseline: cross-entropy alone, on the same rows in the same order; no teacher is started.
        checkpoint_uri: folder or URI to keep checkpoints in as well, and to resume from.

    Raises:
        InputError: something named in the message does not fit.
        TeacherError: a teacher process failed.
        NonFiniteError: the numbers of the training are no longer finite.
    """
    keep_compilations()
    arguments = (spec, inputs, Path(out_dir), baseline, checkpoint_uri)
    gpus = torch.cuda.device_count()
    if gpus < 2 or "WORLD_SIZE" in os.environ:
        if not baseline and any(teacher.scores is None for teacher in spec.teachers):
            start_server(TEACHERS_IMPORT)  # which takes seconds, and the student loads meanwhile
        return _distill(*arguments)
    summary: TrainingSummary = on_every_gpu(gpus, _distill, arguments, rank_timeout(spec.training))
    return summary


def _kd_name(teachers: Sequence[ReadyTeacher]) -> str:
    """What the terminal calls the KD term."""
    return "kd (a score, no distance)" if any(teacher.mode in NO_DISTANCES for teacher in teachers) else "kd"


def _distill(
    spec: DistillationSpec, inputs: TrainingInputs, out_dir: Path, baseline: bool, checkpoint_uri: str | None
) -> TrainingSummary:
    """Trains in this process, which is one of the ranks if there are several."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with owned(out_dir / "checkpoints", checkpoint_uri) if _is_first_rank() else contextlib.nullcontext():
        return _train(spec, inputs, out_dir, baseline, checkpoint_uri)


def _train(
    spec: DistillationSpec, inputs: TrainingInputs, out_dir: Path, baseline: bool, checkpoint_uri: str | None
) -> TrainingSummary:
    started, first_rank = time.monotonic(), _is_first_rank()
    transformers_logging.disable_progress_bar()
    scored = () if baseline else scored_teachers(spec, inputs)
    data = _data(spec, inputs, scored)
    args = training_arguments(spec, out_dir, len(data.train))
    watch = Watch(args.process_index, args.world_size, spec.training.timeout)
    watch.start()
    if first_rank:
        logger.info("precision: %s", _precision(args))
    if first_rank:
        check_folder(out_dir)
    checkpoint = _checkpoint(out_dir / "checkpoints", checkpoint_uri, training_identity(spec, inputs, baseline), args.device)
    if first_rank:
        restore(checkpoint, out_dir)
    progress = Progress() if checkpoint is None else load_progress(checkpoint)
    resumed = None if checkpoint is None else step_of(checkpoint)

    loaded = _load_student(spec, checkpoint, alone=baseline)
    teachers = () if baseline else ready_teachers(spec, inputs, loaded, args.device)
    check_classes(spec, teachers, scored)
    teachers = with_measurements(teachers, scored, data.validation)
    learnable = {teacher.id: teacher.learnable for teacher in teachers if teacher.learnable is not None}
    if checkpoint is not None and learnable:
        for teacher_id, weights in load_file(checkpoint / LEARNABLE_FILE).items():
            learnable[teacher_id].log_weights.data = weights
    for teacher in teachers if first_rank else ():
        if teacher.mode in WORSE_THAN_CE:
            logger.warning(
                "teacher %s: %s made a worse student than no distillation where it was measured", teacher.id, teacher.mode
            )
    student = Student(loaded, training_loss(spec, baseline), learnable)
    with contextlib.ExitStack() as stack:
        callbacks = stack.enter_context(trackers(spec, out_dir, baseline)) if first_rank else []
        log = (
            stack.enter_context(RunLog(out_dir / "log.jsonl", args.max_steps, resumed, _kd_name(teachers)))
            if first_rank
            else None
        )
        setups = [teacher.setup for teacher in teachers if teacher.setup is not None]
        pool = stack.enter_context(TeacherPool(setups)) if setups else None
        skip = spec.training.skip_nonfinite
        record = RunRecord(out_dir, progress, log, checkpoint_uri, stored_dtype(spec.student.model), skip, watch)
        trainer = DistillationTrainer(student, args, data, Teaching(teachers, pool), record, callbacks)
        if checkpoint is not None:
            check_optimizer(checkpoint, trainer.is_fsdp_enabled)
        progress.seconds["setup"] = time.monotonic() - started
        with _plainly():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_student(out_dir / "last")
    watch.stop()
    summary = _summary(trainer, resumed, time.monotonic() - started)
    if first_rank:
        if not (out_dir / "best").exists():  # no validation: the last is the best there is
            twin_of(out_dir / "last", out_dir / "best")
        summary.write(out_dir / "summary.json")
        seal(out_dir, ("best", "last", "log.jsonl", "summary.json"))
    return summary


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _checkpoint(folder: Path, uri: str | None, own: str, device: torch.device) -> Path | None:
    """The checkpoint to go on from, which the first rank decides. All ranks call it."""
    found = None
    if _is_first_rank():
        check_inputs(folder, own)
        found = latest_checkpoint(folder, uri)
        clean_up(folder, uri, found)
    chosen = [None if found is None else step_of(found)]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, src=0, device=device)
    return found if found is not None or chosen[0] is None else checkpoint_of_step(folder, uri, chosen[0])


def _load_student(spec: DistillationSpec, checkpoint: Path | None, alone: bool) -> Loaded:
    """The student, or what a checkpoint has of it.

    Of one vocabulary only the ids count that every model has a row for, unless it learns `alone`: the others stand for no text.
    """
    tokenizer = load_tokenizer(spec.student.model, spec.student.tokenizer)
    loaded = Loaded.of(student_model(spec, checkpoint), tokenizer, f"student ({spec.student.model})")
    others = [] if alone else [head_rows(t.model) for t in spec.teachers if not t.cross_tokenizer]
    return replace(loaded, rows=min([loaded.rows, *others]))


def _data(spec: DistillationSpec, inputs: TrainingInputs, scored: Sequence[ScoredTeacher | None]) -> TrainingData:
    first = local_copy(str(inputs.rows[0]))
    heard = [teacher for teacher, _ in zip(spec.teachers, scored) if teacher.cross_tokenizer]  # a baseline hears none
    sizes = {"student": head_rows(spec.student.model)} | {teacher_column(t.id): head_rows(t.model) for t in heard}
    return TrainingData(
        collate=Collator.for_rows(spec, first / "train", scored, sizes),
        train=rows_of_shards(spec.data, [str(folder) for folder in inputs.rows], check=rows_check(spec, scored)),
        validation=load_rows(first / "validation") if spec.data.validation else None,
        domains=frozenset(part.domain or "" for part in spec.data.parts),
    )


def _precision(args: TrainingArguments) -> str:
    return "bf16" if args.bf16 else "fp32"


def _summary(trainer: DistillationTrainer, resumed_from: int | None, seconds: float) -> TrainingSummary:
    """What `summary.json` tells of a finished training."""
    progress, student = trainer.record.progress, trainer.student
    return TrainingSummary(
        steps=trainer.state.global_step,
        tokens=progress.tokens,
        checkpoints=trainer.record.checkpoint_uri,
        skipped_steps=progress.skipped,
        seconds=seconds,
        resumed_from=resumed_from,
        best_step=progress.best_step,
        best_validation_bits_per_byte=progress.best_bits_per_byte,
        last_validation_bits_per_byte=progress.last_bits_per_byte,
        modes={teacher.id: teacher.mode or "same_vocabulary" for teacher in trainer.teaching.teachers},
        parameters=sum(p.numel() for p in student.model.parameters()),
        trainable_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
        ranks=trainer.args.world_size,
        precision=_precision(trainer.args),
        environment=describe_environment(),
        seconds_by_phase=progress.seconds,
    )


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """An InputError of one of the data loader's workers comes with the worker's traceback; its last line says it all."""
    try:
        yield
    except InputError as e:
        raise InputError(str(e).strip().rpartition(f"{InputError.__name__}: ")[2]) from e
