"""First step: check the spec and its overrides, and give every other step the part of the spec that it reads."""

from typing import NamedTuple

from components.cli import component, main


@component
def resolve(spec: str, overrides: str = "", compiled: str = "") -> NamedTuple(  # type: ignore[valid-type]
    "Resolved",
    [
        ("overlap", str),
        ("projections", str),
        ("prepare", str),
        ("score", str),
        ("distill", str),
        ("baseline", str),
        ("trial", str),
        ("evaluate_student", str),
        ("evaluate_teachers", str),
        ("report", str),
        ("checkpoints", str),
        ("teacher_memory", str),
        ("student_memory", str),
        ("inputs", list),
        ("plan", dict),
        ("times", dict),
    ],
):
    """Check a spec with its overrides, that its models and data are there and that its output can be written.

    Prints the view of the spec that each step is given, and when the step began.

    Args:
        spec: The whole spec.
        overrides: Changes to it, as dotted.key=value items separated by blanks.
        compiled: What the compiled pipeline has built in, as JSON; a spec that contradicts it is refused.

    Returns:
        overlap: What overlap reads of the spec, with a digest of what else it reads; so for the other steps.
        projections: What projections reads.
        prepare: What prepare reads.
        score: What score reads.
        distill: What distill reads.
        baseline: What distill reads for the twin that is trained on cross-entropy only.
        trial: What trial reads.
        evaluate_student: What evaluate reads for the student and its twin.
        evaluate_teachers: What evaluate reads for the teachers.
        report: What report reads, which is the whole spec with its overrides.
        checkpoints: Folder or URI for the checkpoints of this run; empty where there is no place that lasts.
        teacher_memory: Memory of a step that evaluates teachers or computes their scores, as Kubernetes writes it.
        student_memory: So for a step that evaluates the student.
        inputs: Every model and corpus that is read, as field, uri and version.
        plan: What the run will take: rows, tokens, memory, downloads, GPU hours and disk.
        times: When this step started (Unix time), and how many seconds it took.
    """
    from xtoken_core.workflow.resolve import resolve
    from xtoken_core.workflow.step import step

    with step("resolve") as times:
        *views, inputs, plan = resolve(spec, overrides, compiled)
        return (*views, [entry.model_dump(exclude_none=True) for entry in inputs], plan.model_dump(exclude_none=True), times())


if __name__ == "__main__":
    main(resolve)
