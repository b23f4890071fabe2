"""The spec's training section as PyTorch and transformers have it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from xtoken_core.configs import compute_dtype
from xtoken_core.spec import DistillationSpec, LossSpec, TrainingSpec
from xtoken_core.training.checkpoints import KEPT

ONE_VOCABULARY_SHARE = 0.3
"""KD's share of CE under teachers of the student's vocabulary: at the rate at which CE alone is at its best, a share of 1 was worse than CE there,
and this one better (`tests/benchmarks/results/2026-11-27-quality-more.md`)."""


def training_loss(spec: DistillationSpec, baseline: bool) -> LossSpec:
    """The loss with `auto` out of the way (each teacher has its mode); the baseline's is CE, of weight 1."""
    if baseline:
        return LossSpec(mode="p_kl", dynamic_scaling=True)
    chosen: dict[str, object] = {"mode": "p_kl"} if spec.loss.mode == "auto" else {}
    if spec.loss.dynamic_scaling == "auto":
        chosen["dynamic_scaling"] = True if any(teacher.cross_tokenizer for teacher in spec.teachers) else ONE_VOCABULARY_SHARE
    return spec.loss.model_copy(update=chosen)


def training_arguments(spec: DistillationSpec, out_dir: Path, rows: int) -> TrainingArguments:
    """The spec's training section as transformers has it, for so many training rows.

    Raises InputError where a step's rows do not divide over ranks, or epochs make no number of steps.
    """
    training, ranks, cuda = spec.training, int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    accumulation = training.accumulation(ranks)
    steps = training.steps(rows)
    workers = 2 if cuda else 0
    sharded = training.sharding == "fsdp" and ranks > 1
    return TrainingArguments(
        output_dir=str(out_dir / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=_scheduler(training),
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        bf16=compute_dtype(training.precision) == torch.bfloat16,
        use_cpu=not cuda,
        ddp_backend=None if cuda or ranks == 1 else "gloo",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # no buffer changes
        ddp_timeout=rank_timeout(training),
        fsdp=True if sharded else None,  # type: ignore[arg-type]
        fsdp_config={"version": 2} if sharded else None,
        logging_steps=training.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if spec.data.validation else "no",
        eval_steps=training.eval_steps or steps,
        eval_on_start=bool(spec.data.validation),
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or steps,
        save_total_limit=KEPT,
        report_to="none",  # see `trackers`
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=max(2, math.ceil(accumulation / workers)) if workers else None,  # a whole step ahead
        dataloader_pin_memory=cuda,
    )


def rank_timeout(training: TrainingSpec) -> int:
    """Seconds that a collective waits for the slowest rank: more than a teacher of that one may take."""
    return math.ceil(1.5 * training.timeout)


def _scheduler(training: TrainingSpec) -> str:
    return "constant_with_warmup" if training.scheduler == "constant" and training.warmup_steps else training.scheduler
