"""Distillation from a spec and its prepared inputs to a trained student on disk."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from xtoken_core.data.batch import Collator
from xtoken_core.errors import InputError
from xtoken_core.losses.learnable import LearnableProjection
from xtoken_core.models import Loaded, head_rows
from xtoken_core.spec import DistillationSpec
from xtoken_core.teachers.pool import TeacherPool
from xtoken_core.tokenization import load_tokenizer
from xtoken_core.training.checkpoints import (
    LEARNABLE_FILE,
    STATE_FILE,
    Progress,
    check_inputs,
    latest_checkpoint,
    publish_checkpoint,
    restore,
)
from xtoken_core.training.environment import describe_environment
from xtoken_core.training.log import RunLog
from xtoken_core.training.settings import training_arguments, training_loss
from xtoken_core.training.student import Student, student_model
from xtoken_core.training.teachers import ready_teacher
from xtoken_core.training.trackers import trackers
from xtoken_core.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)


def distill(
    spec: DistillationSpec,
    modes: dict[str, str],
    rows: Sequence[str | Path],
    projections: Sequence[str | Path | None],
    out_dir: str | Path,
    baseline: bool = False,
    checkpoint_uri: str | None = None,
) -> dict[str, Any]:
    """Trains the student and returns the summary that it also writes.

    With several GPUs, one process per GPU is started, unless torchrun has done so already.

    Args:
        spec: read for student, teachers, loss, data and training.
        modes: loss mode of each cross-tokenizer teacher by id, where neither teacher nor loss fix it.
        rows: folders or URIs of prepared rows, one per shard, each with `train`; the first with `validation` if the spec has such data.
        projections: per teacher the file of its W; None for one with the student's vocabulary.
        out_dir: gets `last` and `best` (by validation bits per byte; folders that AutoModelForCausalLM and AutoTokenizer load), `log.jsonl`,
            `summary.json`, `tensorboard`, `checkpoints`.
        baseline: cross-entropy alone, on the same rows in the same order; no teacher is started.
        checkpoint_uri: folder or URI to keep checkpoints in as well, and to resume from.

    Raises:
        InputError: something named in the message does not fit.
        TeacherError: a teacher process failed.
    """
    arguments = (spec, modes, rows, projections, out_dir, baseline, checkpoint_uri)
    gpus = torch.cuda.device_count()
    if gpus < 2 or "WORLD_SIZE" in os.environ:
        return _distill(*arguments)
    return _on_every_gpu(gpus, arguments)


def _on_every_gpu(gpus: int, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Runs `_distill` in one process per GPU of this host, as torchrun would; the first rank's summary."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(1, 1, gpus, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    try:
        return elastic_launch(config, _distill)(*arguments)[0]
    except ChildFailedError as e:
        words = e.get_first_failure()[1].error_file_data["message"]
        kind, _, text = words["message"].partition(": ") if isinstance(words, dict) else ("", "", "")
        if kind == InputError.__name__:
            raise InputError(text) from None
        raise


def _distill(
    spec: DistillationSpec,
    modes: dict[str, str],
    rows: Sequence[str | Path],
    projections: Sequence[str | Path | None],
    out_dir: str | Path,
    baseline: bool,
    checkpoint_uri: str | None,
) -> dict[str, Any]:
    started = time.monotonic()
    transformers_logging.disable_progress_bar()
    out_dir, first_rank = Path(out_dir), os.environ.get("RANK", "0") == "0"
    out_dir.mkdir(parents=True, exist_ok=True)
    args = training_arguments(spec, out_dir)
    precision = "bf16" if args.bf16 else "fp32"
    if first_rank:
        logger.info("precision: %s", precision)
        check_inputs(out_dir / "checkpoints", spec, modes, baseline)
    checkpoint = latest_checkpoint(out_dir / "checkpoints", checkpoint_uri)
    progress = Progress() if checkpoint is None else Progress(**json.loads((checkpoint / STATE_FILE).read_text()))
    if first_rank:
        if checkpoint is None:  # an earlier run's student would pass for this one's best
            for name in ("best", "last"):
                shutil.rmtree(out_dir / name, ignore_errors=True)
        else:
            restore(checkpoint, out_dir)

    tokenizer = load_tokenizer(spec.student.model, spec.student.tokenizer)
    loaded = Loaded.of(student_model(spec, checkpoint), tokenizer, f"student ({spec.student.model})")
    model, table, student_rows = loaded.model, loaded.table, loaded.rows
    if not baseline:  # of one vocabulary only the ids that every model has a row for: the others stand for no text
        student_rows = min([student_rows, *(head_rows(t.model) for t in spec.teachers if not t.cross_tokenizer)])
    teachers = (
        []
        if baseline
        else [ready_teacher(spec, i, modes, table, student_rows, projections[i], args.device) for i in range(len(spec.teachers))]
    )
    learnable = {i: teacher.learnable for i, teacher in enumerate(teachers) if teacher.learnable is not None}
    if checkpoint is not None and learnable:
        for index, weights in load_file(checkpoint / LEARNABLE_FILE).items():
            learnable[int(index)].log_weights.data = weights
    student = Student(model, student_rows, learnable, training_loss(spec, baseline))

    def save_projections(folder: Path, learned: dict[int, Tensor]) -> None:
        for index, weights in learned.items():
            teacher = teachers[index]
            assert teacher.learnable is not None and teacher.projection is not None
            learned_projection = LearnableProjection(teacher.projection)
            learned_projection.log_weights.data = weights
            name = folder / f"projection-{spec.teachers[index].id}.safetensors"
            learned_projection.projection().save(name, table.fingerprint, teacher.fingerprint, {"learned": True})

    from xtoken_core.data.reading import load_rows, rows_of_shards
    from xtoken_core.storage import local_copy

    first_rows = local_copy(str(rows[0]))

    resumed = None if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
    with contextlib.ExitStack() as stack:
        callbacks = stack.enter_context(trackers(spec, out_dir, baseline)) if first_rank else []
        log = stack.enter_context(RunLog(out_dir / "log.jsonl", args.max_steps, resumed)) if first_rank else None
        pool = stack.enter_context(TeacherPool([teacher.setup for teacher in teachers])) if teachers else None
        trainer = DistillationTrainer(
            student,
            args,
            collate=Collator.for_rows(spec, first_rows / "train"),
            train_rows=rows_of_shards(spec.data, [str(folder) for folder in rows]),
            validation_rows=load_rows(first_rows / "validation") if spec.data.validation else None,
            tokenizer=tokenizer,
            pool=pool,
            templates=[teacher.template for teacher in teachers],
            teacher_ids=[teacher.id for teacher in spec.teachers[: len(teachers)]],
            projection_rates={i: t.projection.learning_rate for i, t in enumerate(spec.teachers) if t.projection is not None},
            out_dir=out_dir,
            progress=progress,
            log=log,
            save_projections=save_projections,
            publish_checkpoint=lambda folder: publish_checkpoint(folder, checkpoint_uri),
            callbacks=callbacks,
        )
        ready = time.monotonic()
        with _plainly():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_student(out_dir / "last")
    summary = {
        "steps": trainer.state.global_step,
        "tokens": progress.tokens,
        "seconds": time.monotonic() - started,
        "best_step": progress.best_step,
        "best_validation_bits_per_byte": progress.best_bits_per_byte,
        "last_validation_bits_per_byte": progress.last_bits_per_byte,
        "modes": {t.id: teacher.template.mode or "same_vocabulary" for t, teacher in zip(spec.teachers, teachers)},
        "resumed_from": resumed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "ranks": args.world_size,
        "precision": precision,
        "environment": describe_environment(),
        "seconds_by_phase": {"setup": ready - started, **progress.seconds},
    }
    if first_rank:
        if not (out_dir / "best").exists():  # no validation: the last is the best there is
            shutil.copytree(out_dir / "last", out_dir / "best", copy_function=os.link)
        (out_dir / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """An InputError of one of the data loader's workers comes with the worker's traceback; its last line says it all."""
    try:
        yield
    except InputError as e:
        raise InputError(str(e).strip().rpartition(f"{InputError.__name__}: ")[2]) from e
