"""Warnings: what in a run's files should make its reader careful, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from xtoken_core.report.run import Run
from xtoken_core.report.verdict import bits_per_byte
from xtoken_core.results.subject import BEFORE, BEST, TWIN_BEST, teacher_subject

SHARE_OF_EXACT_CHUNKS = 0.5
"""Fewer chunks whose text is equal on both sides than this is worth a word."""

FALL = 0.01
"""Share of places by which the agreement with a teacher may fall without a word."""

SPIKE = 20.0
"""Gradient norms above this multiple of their median are spikes."""


@dataclass(frozen=True)
class Caution:
    """One warning: a title, what was seen, and what helps."""

    title: str
    detail: str


def cautions(run: Run) -> list[Caution]:
    """Every warning the run's files give rise to."""
    checks = (
        _on_validation,
        _on_held_out,
        _on_gradients,
        _on_numbers,
        _on_teachers,
        _on_silence,
        _on_agreement,
        _on_selection,
        _on_chunks,
        _on_projections,
        _on_data,
    )
    return [caution for check in checks for caution in check(run)]


def _on_validation(run: Run) -> Iterator[Caution]:
    """Overfitting, or a run that ended too early."""
    steps, values = run.steps("validation_bits_per_byte")
    if len(values) < 3:
        return
    best, last = values.index(min(values)), values[-1]
    gained = values[0] - values[best]
    if last > values[best] + 0.05 * gained and best < len(values) - 1:
        yield Caution(
            f"Overfitting: best long before the end, at step {steps[best]:,.0f} of {steps[-1]:,.0f}",
            f"Validation went from {values[best]:.3f} back up to {last:.3f} bits per byte. Take the best checkpoint; more text, fewer "
            "steps or a lower learning rate help.",
        )
    elif best == len(values) - 1 and values[-2] - last > 0.02 * gained > 0:
        yield Caution(
            "Still improving at the end",
            f"The last stretch alone gained {values[-2] - last:.3f} bits per byte. A longer run (training.max_steps) would go further.",
        )


def _on_held_out(run: Run) -> Iterator[Caution]:
    """Text that is no longer unseen, since the best of several checkpoints was chosen by it."""
    choices = len(run.steps("validation_bits_per_byte")[1])
    twin = " and the twin" if run.result(TWIN_BEST) else ""
    if choices > 2 and not run.spec["evaluation"]["texts"] and bits_per_byte(run.result(BEST)) is not None:
        yield Caution(
            "The text that chose the best checkpoint also measures it",
            f"The best of {choices} validations flatters the student{twin} a little. Texts of their own "
            "(evaluation.texts) measure it on what nothing was chosen by.",
        )


def _on_gradients(run: Run) -> Iterator[Caution]:
    """Spikes; that norms are above the limit all along is no matter to Adam, whose steps do not depend on their size."""
    steps, norms = run.steps("grad_norm")
    spikes = [step for step, norm in zip(steps, norms) if norm > SPIKE * median(norms)]
    if spikes:
        yield Caution(
            f"Gradient spikes in {len(spikes):,} of {len(steps):,} logged steps",
            f"Norms over {SPIKE:g} times their median, first at step {spikes[0]:,.0f}. A lower learning rate or longer warm-up helps; "
            "odd rows in the data are another cause.",
        )


def _on_numbers(run: Run) -> Iterator[Caution]:
    broken = [line.step for line in run.log if line.of_training and line.loss is None]
    if broken:
        yield Caution(
            f"The loss was not finite in {len(broken)} of the logged steps",
            f"First at step {broken[0]:,}. A lower learning rate, longer warm-up or precision fp32 help.",
        )


def _on_teachers(run: Run) -> Iterator[Caution]:
    """Teachers that have nothing to teach, or no more."""
    states = ((BEFORE, "the student was before it began"), (BEST, "the student is now"))
    for teacher in run.heard:
        score = bits_per_byte(run.result(teacher_subject(teacher)))
        for state, words in states:
            student = bits_per_byte(run.result(state))
            if student is not None and score is not None and score >= student:
                yield Caution(
                    f"Teacher {teacher} is no better than {words}",
                    f"{score:.3f} against {student:.3f} bits per byte on the held-out text: it can hardly help there, and its weight may "
                    "be better spent on another.",
                )
                break


def _on_silence(run: Run) -> Iterator[Caution]:
    """Teachers that were not heard to the end, since they were too little ahead."""
    for teacher in run.teachers:
        last = next((line.silent.get(teacher, []) for line in reversed(run.log) if not line.of_training), [])
        if not last:
            continue
        places = []
        for domain in last:
            lines = [line for line in run.log if not line.of_training and domain in line.silent.get(teacher, ())]
            places.append(f"{f'on {domain}' if domain else 'on all text'} from step {lines[0].step:,}")
        yield Caution(
            f"Teacher {teacher} was no longer heard at the end",
            f"It was not far enough ahead of the student on validation text: {', '.join(places)}. A stronger teacher could teach more; if this "
            "one is to be imitated all the same, set its lead: null.",
        )


def _on_agreement(run: Run) -> Iterator[Caution]:
    """A student that agrees with a teacher less than before it learnt from it."""
    before, after = run.result(BEFORE), run.after
    for teacher in run.heard:
        first, now = (result.agreement.get(teacher) if result else None for result in (before, after))
        if first and now and first.top1 is not None and now.top1 is not None and now.top1 < first.top1 - FALL:
            yield Caution(
                f"The student agrees with {teacher} less than before",
                f"They had the same first choice in {100 * first.top1:.1f} % of the places, now in {100 * now.top1:.1f} %. Other teachers or "
                "the text pull elsewhere; a greater weight, or a smaller learning rate, would show which.",
            )


def _on_selection(run: Run) -> Iterator[Caution]:
    chosen = [line.selected for line in run.log if line.selected]
    idle = [teacher for teacher in run.heard if teacher not in chosen]
    if chosen and idle:
        yield Caution(
            f"Never selected: {', '.join(idle)}",
            f"Over {len(chosen):,} logged steps select_teacher never chose them, yet their forward passes were paid for.",
        )


def _on_chunks(run: Run) -> Iterator[Caution]:
    train = run.prepare.get("train")
    for teacher, counts in train.teachers.items() if train else ():
        if counts.chunks and (share := counts.exact_chunks / counts.chunks) < SHARE_OF_EXACT_CHUNKS:
            yield Caution(
                f"Only {100 * share:.0f} % of the chunks shared with {teacher} have equal text on both sides",
                "The text is changed by a tokenizer's normaliser, or the two disagree on it; check the data's script and normal form.",
            )


def _on_projections(run: Run) -> Iterator[Caution]:
    for teacher, projection in run.projections.items():
        rows, empty = projection.rows, projection.empty
        if empty > 0.02 * rows:
            yield Caution(
                f"{100 * empty / rows:.1f} % of the student's tokens have no counterpart in {teacher}'s vocabulary",
                f"{empty:,} of W's {rows:,} rows are empty: the student's probability on these tokens is compared with nothing.",
            )


def _on_data(run: Run) -> Iterator[Caution]:
    """Text seen many times, documents lost, few documents to measure on."""
    yield from _on_rows(run)
    best = run.result(BEST)
    documents = best.bits_per_byte.documents.bits if best and best.bits_per_byte else []
    if 1 < len(documents) < 10:
        yield Caution(
            f"Measured on {len(documents)} held-out documents",
            "Intervals over so few documents are rough; more held-out text (evaluation.texts) makes the verdict firm.",
        )


def _on_rows(run: Run) -> Iterator[Caution]:
    train, training = run.prepare.get("train"), run.spec["training"]
    if train is None:
        return
    seen = run.summary.steps * training["global_batch_size"] if run.summary else 0
    if train.rows and seen > 4 * train.rows:
        yield Caution(
            f"Little text: every row was seen {seen / train.rows:.0f} times",
            f"{train.rows:,} rows of training text, {seen:,} shown. Fine for a demonstration; watch validation for overfitting.",
        )
    dropped = train.dropped_documents
    if sum(dropped.values()) > 0.01 * train.documents:
        yield Caution(
            f"{sum(dropped.values()):,} of {train.documents:,} documents were left out",
            f"Reasons: {'; '.join(f'{reason} ({count:,})' for reason, count in dropped.items())}.",
        )
