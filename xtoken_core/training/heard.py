"""Where teachers are heard: on domains whose validation text they know better than the student does, by `teachers[].lead`.

A teacher that is behind pulls the student back, and one that is little ahead holds it up on its way past it: measured in
`tests/benchmarks/results/2026-11-27-quality-lead.md`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from transformers import TrainingArguments

from xtoken_core.data.batch import Batch
from xtoken_core.losses import TeacherBatch
from xtoken_core.losses.scores import BITS, teacher_scores
from xtoken_core.training.checkpoints import Progress
from xtoken_core.training.step import Teaching, over_ranks
from xtoken_core.training.validation import HeldOut, of_text


def hear(
    teaching: Teaching, progress: Progress, student: Mapping[str, float], held_out: HeldOut, step: int, args: TrainingArguments
) -> list[str]:
    """Decides after a validation which teachers are heard until the next one; a line for each change. All ranks call it.

    A run that goes on between two validations keeps what the one before has decided, as if it had never stopped.

    Args:
        teaching: its `silent` is set.
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
        leads = {teacher.id: teacher.lead or 0.0 for teacher in teaching.teachers}
        before, progress.silent = progress.silent, silent(progress.teacher_bits, student, leads)
        told = list(_changes(before, progress.silent, progress.teacher_bits, student))
    teaching.silent = progress.silent
    return told


@torch.no_grad()
def bits_of_teachers(teaching: Teaching, held_out: HeldOut, at_once: int, device: torch.device) -> dict[str, dict[str, float]]:
    """By teacher that has a lead to keep, its bits per byte by domain that it teaches. All ranks call it.

    Of one whose scores are read, that is what it was measured at when they were made. What is not finite is left out: such a teacher is
    heard, and the step that hears it ends the run by its name. at_once: batches of a run of the teachers.
    """
    told = {t.id: held_out.by_group(t.measured) for t in teaching.teachers if t.lead is not None and t.measured}
    asked = [(i, t) for i, t in enumerate(teaching.teachers) if t.lead is not None and t.setup is not None]
    sums = torch.zeros(len(asked), len(held_out.groups), 2, dtype=torch.float64, device=device)
    for group, domain in enumerate(held_out.groups if asked else ()):
        batches = list(held_out.batches(domain))
        for first in range(0, len(batches), at_once):
            some = [batch.to(device) for batch in batches[first : first + at_once]]
            runs = teaching.run_processes(some, in_training=False)
            for own, (i, teacher) in zip(sums, asked):
                for batch, logits in zip(some, runs[teacher.id].logits):
                    own[group] += _nats_and_bytes(teacher.batch(logits, of_text(batch.teachers[i]), batch.taught[i]), batch)
    teaching.release()
    sums = over_ranks(sums, device)
    told |= {teacher.id: own for own, (_, teacher) in zip(sums, asked)}
    found = {name: held_out.bits_per_byte(*own.unbind(1)) for name, own in told.items()}
    return {name: {d: bits for d, bits in own.items() if math.isfinite(bits)} for name, own in found.items()}


def _nats_and_bytes(teacher: TeacherBatch, batch: Batch) -> Tensor:
    """[2] float64, of the samples that it teaches."""
    assert teacher.input_ids is not None and teacher.token_mask is not None
    samples = batch.sample_mask if teacher.taught is None else batch.sample_mask * teacher.taught
    return teacher_scores(teacher.logits, teacher.input_ids, teacher.token_mask, samples, BITS, teacher.token_bytes)


def silent(
    teachers: Mapping[str, Mapping[str, float]], student: Mapping[str, float], leads: Mapping[str, float]
) -> dict[str, list[str]]:
    """By teacher the domains on which it is not ahead by its lead; nothing of teachers that are everywhere.

    Args:
        teachers: bits per byte by teacher and domain.
        student: bits per byte by domain.
        leads: by teacher the share of the student's bits.
    """
    found = {name: [d for d, bits in own.items() if bits > (1 - leads[name]) * student[d]] for name, own in teachers.items()}
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
            heard = domain not in now.get(name, ())
            if heard == (domain in before.get(name, ())):
                share, where = 1 - bits / student[domain], f" on {domain}" if domain else ""
                ahead = f"{100 * abs(share):.1f} % {'ahead of' if share >= 0 else 'behind'} the student{where} ({bits:.4f} bits per byte)"
                yield f"teacher {name} is {ahead}: {'heard again' if heard else 'not heard'}"
