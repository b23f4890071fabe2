"""Measure models: the teachers, the student before, or the checkpoints of a trained one."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.cli import component, main


@component
def evaluate(
    spec: str,
    group: str,
    results: Output[Artifact],
    metrics: Output[Metrics],
    run: Input[Model] = None,
    rows: Input[Dataset] = None,
    projections: Input[Artifact] = None,
    modes: dict = {},  # noqa: B006 - KFP reads the default
):
    """Measure bits per byte on held-out text, the tasks of the spec, and a student's agreement with its teachers.

    Args:
        spec: Student, teachers, data and evaluation are read.
        group: Who is measured: teachers, student-before, student-after (its best and its last checkpoint) or baseline (so).
        results: Folder for the figures, one JSON file for each model.
        metrics: The main figures, for KFP.
        run: The folder that distill wrote, for student-after and baseline.
        rows: Folder of rows that prepare wrote (shard 0), for the agreement with the teachers.
        projections: Folder of every W that projections wrote, for the agreement.
        modes: Loss mode of each cross-tokenizer teacher by its id, as overlap prints them, for the agreement.
    """
    from xtoken_core.workflow.step import step

    with step(f"evaluate {group}", results):
        from xtoken_core.workflow.evaluations import evaluate_group
        from xtoken_core.workflow.figures import evaluation_figures, log_figures
        from xtoken_core.workflow.subjects import Group
        from xtoken_core.workflow.views import View
        from xtoken_core.workflow.vocabularies import matrices

        parsed = View.from_text(spec)
        w = matrices(parsed, projections.path if projections else None)
        measured = evaluate_group(parsed, Group.named(group), results.path, run and run.path, rows and rows.path, w, modes)
        results.metadata |= {found.subject.key: found.model for found in measured}
        log_figures(metrics, evaluation_figures(measured))


if __name__ == "__main__":
    main(evaluate)
