"""A plan as the terminal's text."""

from __future__ import annotations

from xtoken_core.costs import GIB
from xtoken_core.results.plan import Plan, PlannedTask


def plan_text(plan: Plan) -> str:
    """The figures of a plan, one a line; what is not known is a dash."""
    rows, tokens = _count(plan.rows_at_least), _count(plan.training_tokens_at_most)
    at_least, at_most = ("", "") if plan.counted else ("at least ", "at most ")
    epochs = "-" if plan.epochs_at_most is None else f"{plan.epochs_at_most:g}"
    lines = [
        ("steps", _count(plan.steps)),
        ("rows of the data", f"{at_least}{rows}"),
        ("tokens of training", f"{at_most}{tokens}"),
        ("epochs", f"{at_most}{epochs}"),
        ("GPU hours of training", f"{_hours(plan.gpu_hours)}  ({plan.speed})"),
        *((f"GPU hours {task.task}", _task(task)) for task in plan.tasks),
        ("GPU hours of all tasks", _hours(plan.all_gpu_hours)),
        *(
            (f"download {m.field}", f"{_size(m.download_bytes)}  ({m.model}, {_count(m.parameters)} weights)")
            for m in plan.models
        ),
        *((f"memory {step}", _size(size)) for step, size in plan.memory.items()),
        *((f"host memory, {who} evaluated", _size(size)) for who, size in plan.host_memory.items()),
        *((f"disk {what}", _size(size)) for what, size in plan.disk_bytes.items()),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _task(task: PlannedTask) -> str:
    known = [
        f"{_count(number)} {what}" for number, what in ((task.steps, "steps"), (task.tokens, "tokens")) if number is not None
    ]
    return f"{_hours(task.gpu_hours)}  ({', '.join(known)})" if known else _hours(task.gpu_hours)


def _hours(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:,.2f}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _size(size: int) -> str:
    """In GiB, or of less than a hundredth of one in MiB."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 or not size else f"{size / 2**20:,.2f} MiB"
