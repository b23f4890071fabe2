"""Run a teacher once over prepared rows, and store what it says of them."""

from typing import NamedTuple

from kfp.dsl import Artifact, Dataset, Input, Output

from components.cli import component, main


@component
def score(
    spec: str,
    teacher: str,
    scores: Output[Artifact],
    rows: Input[Dataset],
    projections: Input[Artifact] = None,
) -> NamedTuple("Outputs", [("uri", str), ("started", float), ("seconds", float)]):  # type: ignore[valid-type]
    """Run one teacher over the training rows, and store the log-probabilities of its likeliest tokens, or cells.

    Prints where the scores lie, and when the step began.

    Args:
        spec: Student, teachers, loss and training are read.
        teacher: Id of the teacher.
        scores: Folder for the scores.
        rows: Folder of rows that prepare wrote, of one shard.
        projections: Folder of every W that projections wrote, whose cells are scored; by default those of the vocabularies alone.

    Returns:
        uri: Where the scores lie.
        started: When this step started (Unix time).
        seconds: How long it took.
    """
    from xtoken_core.workflow.step import step

    with step(f"score {teacher}", scores) as times:
        from xtoken_core.workflow.scoring import score_teacher
        from xtoken_core.workflow.views import View
        from xtoken_core.workflow.vocabularies import matrices

        parsed = View.from_text(spec)
        w = matrices(parsed, projections.path if projections else None)
        score_teacher(parsed, teacher, rows.path, scores.path, w.get(teacher))
        return (scores.uri, *times().values())


if __name__ == "__main__":
    main(score)
