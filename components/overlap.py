"""Compare the vocabularies of the student and its teachers, and settle each teacher's loss mode."""

from typing import NamedTuple

from kfp.dsl import Artifact, Output

from components.cli import component, main


@component
def overlap(spec: str, report: Output[Artifact]) -> NamedTuple("Outputs", [("modes", dict)]):  # type: ignore[valid-type]
    """Audit the vocabularies: overlap, coverage per class of token, fingerprints.

    Prints the loss mode of each cross-tokenizer teacher.

    Args:
        spec: Student, teachers and loss mode are read.
        report: The audit, as JSON.

    Returns:
        modes: Loss mode of each teacher by its id.
    """
    from xtoken_core.workflow.step import step

    with step("overlap", report):
        from xtoken_core.workflow.views import View
        from xtoken_core.workflow.vocabularies import overlap_report

        audit = overlap_report(View.from_text(spec))
        audit.write(report.path)
        return ({teacher: found.mode for teacher, found in audit.teachers.items()},)


if __name__ == "__main__":
    main(overlap)
