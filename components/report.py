"""Last step: the report, and the finished run published at its output."""

from kfp.dsl import HTML, Artifact, Dataset, Input, Markdown, Metrics, Model, Output

from components.cli import component, main


@component
def report(
    spec: str,
    page: Output[HTML],
    summary: Output[Markdown],
    metrics: Output[Metrics],
    overlap: Input[Artifact],
    rows: Input[Dataset],
    run: Input[Model],
    tasks: list = [],  # noqa: B006 - KFP reads the default
    inputs: list = [],  # noqa: B006
    resolved: dict = {},  # noqa: B006
    shards: list = [],  # noqa: B006
    baseline: Input[Model] = None,
    student_before: Input[Artifact] = None,
    student_after_best: Input[Artifact] = None,
    student_after_last: Input[Artifact] = None,
    baseline_best: Input[Artifact] = None,
    baseline_last: Input[Artifact] = None,
    projection_0: Input[Artifact] = None,
    projection_1: Input[Artifact] = None,
    projection_2: Input[Artifact] = None,
    projection_3: Input[Artifact] = None,
    projection_4: Input[Artifact] = None,
    projection_5: Input[Artifact] = None,
    projection_6: Input[Artifact] = None,
    projection_7: Input[Artifact] = None,
    teacher_0: Input[Artifact] = None,
    teacher_1: Input[Artifact] = None,
    teacher_2: Input[Artifact] = None,
    teacher_3: Input[Artifact] = None,
    teacher_4: Input[Artifact] = None,
    teacher_5: Input[Artifact] = None,
    teacher_6: Input[Artifact] = None,
    teacher_7: Input[Artifact] = None,
):
    """Write the report, and publish student, report, logs and projections at output.uri, whole or not at all.

    Args:
        spec: The whole spec.
        page: The report, one HTML file.
        summary: The verdict and its table, as Markdown.
        metrics: The main figures, for KFP.
        overlap: What overlap wrote.
        rows: What prepare wrote (shard 0).
        run: What distill wrote.
        tasks: The tasks of the workflow: name, after.
        inputs: What was read: field, uri, version, as resolve prints them.
        resolved: When the run's first step began and how long it took, as resolve prints them in times.
        shards: URIs of the other shards' rows.
        baseline: What distill wrote with --baseline.
        student_before: What evaluate wrote; so for the other results.
        student_after_best: Result.
        student_after_last: Result.
        baseline_best: Result.
        baseline_last: Result.
        projection_0: What projection wrote for teacher 0, where it has one.
        projection_1: Of teacher 1.
        projection_2: Of teacher 2.
        projection_3: Of teacher 3.
        projection_4: Of teacher 4.
        projection_5: Of teacher 5.
        projection_6: Of teacher 6.
        projection_7: Of teacher 7.
        teacher_0: Result of teacher 0.
        teacher_1: Result of teacher 1.
        teacher_2: Result of teacher 2.
        teacher_3: Result of teacher 3.
        teacher_4: Result of teacher 4.
        teacher_5: Result of teacher 5.
        teacher_6: Result of teacher 6.
        teacher_7: Result of teacher 7.
    """
    from pathlib import Path

    from xtoken_core.workflow.step import step

    projections = (projection_0, projection_1, projection_2, projection_3, projection_4, projection_5, projection_6, projection_7)
    teachers = (teacher_0, teacher_1, teacher_2, teacher_3, teacher_4, teacher_5, teacher_6, teacher_7)
    with step("report", page):
        from xtoken_core.report.answer import markdown
        from xtoken_core.report.answer import metrics as figures
        from xtoken_core.spec import DistillationSpec
        from xtoken_core.workflow.publish import finish

        parsed = DistillationSpec.from_text(spec)
        artifacts = {
            "overlap": overlap,
            "prepare": rows,
            "distill": run,
            "distill-baseline": baseline,
            "evaluate-student-before": student_before,
            "evaluate-student-after-best": student_after_best,
            "evaluate-student-after-last": student_after_last,
            "evaluate-baseline-best": baseline_best,
            "evaluate-baseline-last": baseline_last,
        }
        for teacher, projection, result in zip(parsed.teachers, projections, teachers):
            artifacts |= {f"projection-{teacher.id}": projection, f"evaluate-teacher-{teacher.id}": result}
        there = {name: artifact for name, artifact in artifacts.items() if artifact}
        finished = finish(parsed, there, tasks, inputs, resolved, page.path, shards)
        Path(summary.path).write_text(markdown(finished), encoding="utf-8")
        for name, value in figures(finished).items():
            metrics.log_metric(name, value)


if __name__ == "__main__":
    main(report)
