"""Train the student against its teachers."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.cli import component, main


@component
def distill(
    spec: str,
    run: Output[Model],
    metrics: Output[Metrics],
    rows: Input[Dataset],
    more_rows: list = [],  # noqa: B006 - KFP reads the default
    projections: Input[Artifact] = None,
    modes: dict = {},  # noqa: B006 - KFP reads the default
    scores: list = [],  # noqa: B006 - KFP reads the default
    baseline: bool = False,
    checkpoints: str = "",
    candidate: str = "",
):
    """Train the student on the teachers' distributions and the text, or (baseline) on the text only.

    Args:
        spec: Student, teachers, loss and training are read.
        run: Folder for the trained student (best and last), its log and its summary.
        metrics: The main figures, for KFP.
        rows: Folder of rows that prepare wrote (of several shards, the first one).
        more_rows: Folders or URIs of the other shards.
        projections: Folder of every W that projections wrote, where a teacher has one.
        modes: Loss mode of each cross-tokenizer teacher by its id, as overlap prints them.
        scores: Folders or URIs that score wrote, teacher after teacher, of each one a folder per shard of rows.
        baseline: Cross-entropy only, on the same rows in the same order.
        checkpoints: Folder or URI for checkpoints from which an interrupted training resumes; none by default.
        candidate: The candidate that a pilot's verdict chose, as verdict prints it, which is trained; ce is the one without teachers.
    """
    from xtoken_core.workflow.step import step

    with step("distill-baseline" if baseline else "distill", run):
        from xtoken_core.storage import remove
        from xtoken_core.training.distill import distill
        from xtoken_core.training.inputs import TrainingInputs, by_teacher
        from xtoken_core.workflow.figures import log_figures, training_facts, training_figures
        from xtoken_core.workflow.rungs import as_chosen
        from xtoken_core.workflow.versions import own_folder
        from xtoken_core.workflow.views import View
        from xtoken_core.workflow.vocabularies import matrices

        parsed = View.from_text(spec)
        w = matrices(parsed, projections.path if projections else None)
        inputs = TrainingInputs((rows.path, *more_rows), modes, w, by_teacher(parsed, scores))
        parsed, baseline = as_chosen(parsed, candidate, baseline)
        own = own_folder(checkpoints, parsed, inputs, baseline, [rows.uri, projections.uri if projections else "", *scores])
        summary = distill(parsed, inputs, run.path, baseline, own)
        run.metadata |= training_facts(parsed, summary)
        log_figures(metrics, training_figures(summary))
        remove(f"{run.path}/checkpoints")  # those of `checkpoints` stay until the run is published


if __name__ == "__main__":
    main(distill)
