"""First step: check the spec and its overrides, and give every other step the part of the spec that it reads."""

from typing import NamedTuple

from components.cli import component, main


@component
def resolve(spec: str, overrides: str = "", compiled: str = "") -> NamedTuple(  # type: ignore[valid-type]
    "Views",
    [
        (name, str)
        for name in ("overlap", "prepare", "distill", "baseline", "evaluate_student", "report", "checkpoints")
        + tuple(f"{step}_{i}" for step in ("projection", "evaluate_teacher") for i in range(8))
    ]
    + [("inputs", list), ("times", dict)],
):
    """Check a spec with its overrides, that its models and data are there and that its output can be written.

    Prints the view of the spec that each step is given, and when the step began.

    Args:
        spec: The whole spec.
        overrides: Changes to it, as dotted.key=value items separated by blanks.
        compiled: What the compiled pipeline has built in, as JSON; a spec that contradicts it is refused.
    """
    from xtoken_core.workflow.resolve import resolve
    from xtoken_core.workflow.step import step

    with step("resolve") as times:
        views = resolve(spec, overrides, compiled)
        names = ["overlap", "prepare", "distill", "baseline", "evaluate_student", "report", "checkpoints"]
        names += [f"{name}_{i}" for name in ("projection", "evaluate_teacher") for i in range(8)]
        return (*(views[name] for name in [*names, "inputs"]), times())


if __name__ == "__main__":
    main(resolve)
