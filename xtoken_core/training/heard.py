"""Where teachers are heard: a teacher that the student has passed on a domain has nothing to teach it there.

A teacher that predicts text worse than the student does pulls it back: measured in `tests/benchmarks/results`, quality-passed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from transformers import TrainingArguments

from xtoken_core.data.batch import Batch
from xtoken_core.losses import TeacherBatch
from xtoken_core.losses.scores import BITS, teacher_scores
from xtoken_core.training.checkpoints import Progress
from xtoken_core.training.step import Teaching, over_ranks
from xtoken_core.training.validation import HeldOut


def hear(
    teaching: Teaching, progress: Progress, student: Mapping[str, float], held_out: HeldOut, step: int, args: TrainingArguments
) -> list[str]:
    """Decides after a validation which teachers are heard until the next one; a line for each change. All ranks call it.

    A run that goes on between two validations keeps what the one before has decided, as if it had never stopped.

    Args:
        teaching: its `passed` is set.
        progress: remembers the decision, and what teachers, who do not change, have been measured at.
        student: its bits per byte by domain.
        held_out: what they were measured on.
        step: of the validation.
        args: of the training.
    """
    told: list[str] = []
    if not progress.teacher_bits or step % int(args.eval_steps or 1) == 0:
        if not progress.teacher_bits:
            progress.teacher_bits = bits_of_teachers(teaching, held_out, args.gradient_accumulation_steps, args.device)
        before, progress.passed = progress.passed, passed(progress.teacher_bits, student)
        told = list(_changes(before, progress.passed, progress.teacher_bits, student))
    teaching.passed = progress.passed
    return told


@torch.no_grad()
def bits_of_teachers(teaching: Teaching, held_out: HeldOut, at_once: int, device: torch.device) -> dict[str, dict[str, float]]:
    """By teacher that can be passed, its bits per byte by domain that it teaches. All ranks call it.

    Of one whose scores are read, that is what it was measured at when they were made. at_once: batches of a run of the teachers.
    """
    told = {t.id: held_out.by_group(t.measured) for t in teaching.teachers if t.until_passed and t.measured}
    asked = [(i, t) for i, t in enumerate(teaching.teachers) if t.until_passed and t.setup is not None]
    sums = torch.zeros(len(asked), len(held_out.groups), 2, dtype=torch.float64, device=device)
    for group, domain in enumerate(held_out.groups if asked else ()):
        batches = list(held_out.batches(domain))
        for first in range(0, len(batches), at_once):
            some = [batch.to(device) for batch in batches[first : first + at_once]]
            runs = teaching.run_processes(some, in_training=False)
            for own, (i, teacher) in zip(sums, asked):
                for batch, logits in zip(some, runs[teacher.id].logits):
                    own[group] += _nats_and_bytes(teacher.batch(logits, batch.teachers[i], batch.taught[i]), batch)
    teaching.release()
    sums = over_ranks(sums, device)
    told |= {teacher.id: own for own, (_, teacher) in zip(sums, asked)}
    return {name: held_out.bits_per_byte(*own.unbind(1)) for name, own in told.items()}


def _nats_and_bytes(teacher: TeacherBatch, batch: Batch) -> Tensor:
    """[2] float64, of the samples that it teaches."""
    assert teacher.input_ids is not None and teacher.token_mask is not None
    samples = batch.sample_mask if teacher.taught is None else batch.sample_mask * teacher.taught
    return teacher_scores(teacher.logits, teacher.input_ids, teacher.token_mask, samples, BITS, teacher.token_bytes)


def passed(teachers: Mapping[str, Mapping[str, float]], student: Mapping[str, float]) -> dict[str, list[str]]:
    """By teacher the domains on which the student has fewer bits per byte; nothing of teachers that are ahead everywhere."""
    found = {name: [domain for domain, bits in own.items() if student[domain] < bits] for name, own in teachers.items()}
    return {name: domains for name, domains in found.items() if domains}


def _changes(
    before: Mapping[str, Collection[str]],
    now: Mapping[str, Collection[str]],
    teachers: Mapping[str, Mapping[str, float]],
    student: Mapping[str, float],
) -> Iterator[str]:
    """Yields a line for each teacher and domain of which it is decided otherwise than before."""
    for name, own in teachers.items():
        for domain, bits in own.items():
            was, is_ = (domain in of.get(name, ()) for of in (before, now))
            if was != is_:
                words = "is behind the student: not heard" if is_ else "is ahead of the student again: heard"
                yield f"teacher {name} {words}{f' on {domain}' if domain else ''} ({bits:.4f} against {student[domain]:.4f} bits per byte)"
