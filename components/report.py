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
    run: Input[Model] = None,
    baseline: Input[Model] = None,
    pilot: Input[Artifact] = None,
    projections: Input[Artifact] = None,
    evaluated_teachers: Input[Artifact] = None,
    evaluated_before: Input[Artifact] = None,
    evaluated_after: Input[Artifact] = None,
    evaluated_baseline: Input[Artifact] = None,
    tasks: list = [],  # noqa: B006 - KFP reads the default
    inputs: list = [],  # noqa: B006
    resolved: dict = {},  # noqa: B006
    shards: list = [],  # noqa: B006
    pipeline_run: str = "",
):
    """Write the report, and publish student, report, logs and projections at output.uri, whole or not at all.

    Then register the student, if the spec names a registry and the verdict allows it.

    Args:
        spec: The whole spec.
        page: The report, one HTML file.
        summary: The verdict and its table, as Markdown.
        metrics: The main figures, for KFP.
        overlap: What overlap wrote.
        rows: What prepare wrote (shard 0).
        run: What distill wrote; none where a pilot is all there is.
        baseline: What distill wrote with --baseline.
        pilot: What verdict wrote.
        projections: What projections wrote.
        evaluated_teachers: What evaluate wrote for the group teachers.
        evaluated_before: What evaluate wrote for student-before.
        evaluated_after: What evaluate wrote for student-after.
        evaluated_baseline: What evaluate wrote for baseline.
        tasks: The tasks of the workflow, as name and after; of those whose artifacts are not read, start and seconds too.
        inputs: What was read, as field, uri and version, as resolve prints them.
        resolved: When the run's first step began and how long it took, as resolve prints them in times.
        shards: URIs of the other shards' rows.
        pipeline_run: Id of the run of Kubeflow Pipelines.
    """
    from pathlib import Path

    from xtoken_core.workflow.step import step

    with step("report", page):
        from xtoken_core.report.answer import markdown
        from xtoken_core.report.answer import metrics as figures
        from xtoken_core.results.workflow import ReadInput, StepTimes, Task
        from xtoken_core.spec import DistillationSpec
        from xtoken_core.workflow.figures import log_figures
        from xtoken_core.workflow.kubeflow import pipeline_run as pipeline_run_of
        from xtoken_core.workflow.publish import Parts, finish
        from xtoken_core.workflow.registry import register
        from xtoken_core.workflow.subjects import Group

        results = (evaluated_teachers, evaluated_before, evaluated_after, evaluated_baseline)
        parsed = DistillationSpec.from_text(spec)
        parts = Parts(
            overlap,
            rows,
            run,
            baseline,
            projections,
            pilot=pilot,
            evaluations={group: artifact for group, artifact in zip(Group, results) if artifact},
            shards=shards,
            tasks=[Task(**task) for task in tasks],
            inputs=[ReadInput(**entry) for entry in inputs],
            resolved=StepTimes(**resolved),
            pipeline_run=pipeline_run_of(pipeline_run, parsed.output.pipelines_ui),
        )
        finished = finish(parsed, parts, page.path)
        told = register(parsed, finished)
        if parsed.output.registry:
            print(told, flush=True)
        Path(summary.path).write_text(f"{markdown(finished)}\n{told}\n", encoding="utf-8")
        for artifact in (page, summary):
            artifact.metadata["published"] = parsed.output.uri
        page.metadata["registry"] = told
        log_figures(metrics, figures(finished))


if __name__ == "__main__":
    main(report)
