"""Train the student on several hosts: distill, by way of a Kubeflow TrainJob."""

from kfp.dsl import Artifact, Input, Metrics, Model, Output

from components.cli import component, main


@component
def launch(
    spec: str,
    run: Output[Model],
    metrics: Output[Metrics],
    rows: list,
    resources: str,
    projections: Input[Artifact] = None,
    modes: dict = {},  # noqa: B006 - KFP reads the default
    scores: list = [],  # noqa: B006 - KFP reads the default
    baseline: bool = False,
    checkpoints: str = "",
    candidate: str = "",
):
    """Create a TrainJob that trains the student on several hosts, print its log, and end as it ends.

    Rows, projections, scores and the run are URIs that every host reaches; the hosts publish the run themselves.

    Args:
        spec: Student, teachers, loss and training are read.
        run: Where the hosts publish the trained student, its log and its summary.
        metrics: The main figures, for KFP.
        rows: URIs of the rows that prepare wrote, one per shard.
        resources: The spec's resources, as JSON: image, hosts and what each gets.
        projections: Folder of every W that projections wrote, where a teacher has one.
        modes: Loss mode of each cross-tokenizer teacher by its id, as overlap prints them.
        scores: URIs that score wrote, teacher after teacher, of each one a folder per shard of rows; every host reads them.
        baseline: Cross-entropy only, on the same rows in the same order.
        checkpoints: URI for checkpoints from which an interrupted training resumes; none by default.
        candidate: The candidate that a pilot's verdict chose, as verdict prints it, which is trained; ce is the one without teachers.
    """
    from xtoken_core.workflow.step import step

    with step("distill-baseline" if baseline else "distill", run):
        from xtoken_core.workflow.figures import log_figures, read_summary, training_facts, training_figures
        from xtoken_core.workflow.trainjob import launch
        from xtoken_core.workflow.trainjob_manifest import Reads
        from xtoken_core.workflow.views import View

        reads = Reads(rows, modes, projections and projections.uri, scores, checkpoints)
        launch(spec, resources, reads, run.uri, baseline, candidate)
        summary = read_summary(run.uri)
        run.metadata |= training_facts(View.from_text(spec), summary)
        log_figures(metrics, training_figures(summary))


if __name__ == "__main__":
    main(launch)
