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
    """
    import json
    from pathlib import Path

    from xtoken_core.workflow import step

    with step("overlap", report):
        from xtoken_core.overlap import overlap_report
        from xtoken_core.spec import DistillationSpec

        audit = overlap_report(DistillationSpec.from_text(spec))
        Path(report.path).write_text(json.dumps(audit, ensure_ascii=False), encoding="utf-8")
        return ({teacher: result["mode"] for teacher, result in audit["teachers"].items()},)


if __name__ == "__main__":
    main(overlap)
