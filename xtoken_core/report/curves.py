"""The curves of one run's report, in groups: quality, distillation, speed."""

from __future__ import annotations

from dataclasses import replace

from xtoken_core.modes import NO_DISTANCES
from xtoken_core.report.charts import Bar, Chart, Series, Style, duration_bars, line_chart
from xtoken_core.report.run import Run

STUDENT, TWIN, FIRST_TEACHER = 0, 1, 2
"""Colors of the student, of its cross-entropy twin, and of teacher_0; the other teachers follow."""


def charts(run: Run) -> list[tuple[str, list[Chart]]]:
    """Headed groups of charts, those without data left out."""
    training = run.spec["training"]
    groups = [
        (
            "What the student learned",
            [_validation(run), _twinned(run, "Training loss, cross-entropy part", "nats per token", "ce"), _accuracy(run)],
        ),
        (
            "The distillation loss",
            [
                _twinned(run, "Total loss", "KD + CE, nats per token", "loss"),
                _per_teacher(run, "Distillation loss of each teacher", _kd_unit(run), "kd", may_be_log=True),
                _weights(run),
                _selected(run),
                _scale(run),
            ],
        ),
        (
            "The optimiser",
            [
                _plain(run, "Learning rate", "step size of AdamW", "learning_rate"),
                _twinned(
                    run,
                    f"Gradient norm, clipped at {training['max_grad_norm']:g}",
                    "L2, before clipping",
                    "grad_norm",
                    may_be_log=True,
                ),
            ],
        ),
        (
            "Speed and memory",
            [
                _twinned(run, "Throughput", "student tokens per second", "tokens_per_second"),
                _step_time(run),
                _twinned(run, "Memory", "GiB, student and teachers", "memory_gib"),
            ],
        ),
    ]
    drawn = [(title, [chart for chart in group if chart]) for title, group in groups]
    return [(title, group) for title, group in drawn if group]


def phase_bars(run: Run) -> list[Bar]:
    """Where the time of the training went, longest phase first."""
    phases = {name: seconds for name, seconds in (run.summary.seconds_by_phase if run.summary else {}).items() if seconds >= 0.05}
    total = sum(phases.values())
    rows = sorted(phases.items(), key=lambda phase: -phase[1])
    return duration_bars([(name, seconds, f"{100 * seconds / total:.0f} %") for name, seconds in rows])


def run_seconds(run: Run) -> float | None:
    """From the start of the first task to the end of the last, of those that ran; None where no times are known."""
    times = [(t.start, t.start + t.seconds) for t in run.tasks if t.start and t.seconds is not None and t.status != "cached"]
    return max(end for _, end in times) - min(start for start, _ in times) if times else None


def task_bars(run: Run) -> list[Bar]:
    """How long each task of the DAG took, longest first; after them those from the cache, which took no time in this run."""
    timed = [(task.status == "cached", task.name, task.seconds) for task in run.tasks if task.seconds]
    timed.sort(key=lambda task: (task[0], -task[2]))
    bars = duration_bars([(name, seconds, "from cache" if cached else "") for cached, name, seconds in timed])
    return [replace(bar, pale=bool(bar.note)) for bar in bars]


def _validation(run: Run) -> Chart | None:
    best = run.summary.best_step if run.summary else None
    marks = [(float(best), "best")] if best is not None else []
    series = _student_and_twin(run, "validation_bits_per_byte", points=True)
    return line_chart("Validation", "bits per byte", series, Style(marks=marks, wide=True))


def _accuracy(run: Run) -> Chart | None:
    series = [replace(s, values=[100 * value for value in s.values]) for s in _student_and_twin(run, "accuracy")]
    return line_chart("Next token right", "% of training tokens", series)


def _student_and_twin(run: Run, key: str, points: bool = False) -> list[Series]:
    series = [
        Series("student", *run.steps(key), STUDENT, points=points),
        Series("twin, cross-entropy alone", *run.steps(key, baseline=True), TWIN, dashed=True, points=points),
    ]
    return [s for s in series if s.values]


def _twinned(run: Run, title: str, unit: str, key: str, may_be_log: bool = False) -> Chart | None:
    return line_chart(title, unit, _student_and_twin(run, key), Style(may_be_log=may_be_log))


def _plain(run: Run, title: str, unit: str, key: str, may_be_log: bool = False) -> Chart | None:
    return line_chart(title, unit, [Series(title, *run.steps(key), STUDENT)], Style(may_be_log=may_be_log))


def _teacher_series(run: Run, key: str) -> list[Series]:
    return [Series(t, *run.steps(key, teacher=t), FIRST_TEACHER + i) for i, t in enumerate(run.teachers)]


def _per_teacher(run: Run, title: str, unit: str, key: str, may_be_log: bool = False) -> Chart | None:
    return line_chart(title, unit, _teacher_series(run, key), Style(may_be_log=may_be_log))


def _kd_unit(run: Run) -> str:
    """What the value of KD is: for some modes not a distance, and then it may lie below zero."""
    modes = set(run.summary.modes.values()) if run.summary else set()
    if modes & set(NO_DISTANCES):
        return "KL, but where the mode is h_kl or gold a score, not a distance; nats, unweighted"
    return "KL, nats, unweighted"


def _weights(run: Run) -> Chart | None:
    """Weights that follow the teachers' scores; fixed ones stand in words beside the teacher."""
    return (
        _per_teacher(run, "Weight of each teacher", "share of the KD sum", "weight")
        if run.spec["loss"]["weight_metric"]
        else None
    )


def _scale(run: Run) -> Chart | None:
    dynamic = run.spec["loss"]["dynamic_scaling"]
    unit = "its share of CE / KD of the last step, times what kd_course leaves"
    return _plain(run, "Dynamic factor of KD", unit, "scale", may_be_log=True) if dynamic else None


def _selected(run: Run) -> Chart | None:
    chosen = [(line.step, run.teachers.index(line.selected)) for line in run.log if line.selected in run.teachers]
    series = [
        Series(t, [s for s, c in chosen if c == i], [c for _, c in chosen if c == i], FIRST_TEACHER + i, points=True)
        for i, t in enumerate(run.teachers)
    ]
    return line_chart("Selected teacher", "lowest cross-entropy", series, Style(names=run.teachers))


def _step_time(run: Run) -> Chart | None:
    whole = Series("whole step", *run.steps("seconds_step"), STUDENT)
    return line_chart("Time of a step", "seconds", [whole, *_teacher_series(run, "seconds")])
