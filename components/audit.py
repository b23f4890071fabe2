"""Before any short run of a pilot: which teachers are no better than the student."""

from typing import NamedTuple

from kfp.dsl import Artifact, Input

from components.cli import component, main


@component
def audit(before: Input[Artifact], teachers: Input[Artifact]) -> NamedTuple(  # type: ignore[valid-type]
    "Outputs", [("lines", list), ("started", float), ("seconds", float)]
):
    """Compare the teachers with the student in bits per byte of each held-out corpus.

    Args:
        before: What evaluate wrote for student-before.
        teachers: What evaluate wrote for teachers.

    Returns:
        lines: A line for each teacher that is no better somewhere.
        started: When this step started (Unix time).
        seconds: How long it took.
    """
    from xtoken_core.workflow.step import step

    with step("audit") as times:
        from xtoken_core.workflow.evaluations import read_evaluations
        from xtoken_core.workflow.pilot_verdict import audit

        lines = audit(read_evaluations(before.path), read_evaluations(teachers.path))
        print("\n".join(lines) or "every teacher is better than the student on all of the held-out text", flush=True)
        return (lines, *times().values())


if __name__ == "__main__":
    main(audit)
