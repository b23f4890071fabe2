"""One short run of a pilot, trained and measured."""

from typing import NamedTuple

from kfp.dsl import Artifact, Dataset, Input, Metrics, Output

from components.cli import component, main


@component
def trial(
    spec: str,
    candidates: list,
    rung: int,
    share: str,
    run: Output[Artifact],
    metrics: Output[Metrics],
    rows: Input[Dataset],
    more_rows: list = [],  # noqa: B006 - KFP reads the default
    projections: Input[Artifact] = None,
    modes: dict = {},  # noqa: B006 - KFP reads the default
    scores: list = [],  # noqa: B006 - KFP reads the default
    standing: list = [],  # noqa: B006 - KFP reads the default
    place: int = 0,
    checkpoints: str = "",
) -> NamedTuple("Outputs", [("result", str), ("started", float), ("seconds", float)]):  # type: ignore[valid-type]
    """Train one candidate of a pilot for a share of the main run's steps, and measure it on the held-out text.

    Prints what it came to, and when the step began. Its log stays; the student that it trained does not.

    Args:
        spec: Student, teachers, loss, data, training and evaluation are read.
        candidates: The candidates, as the pilot section has them; ce is the one without teachers.
        rung: Number of the rung, from 1.
        share: Share of the main run's steps, as text.
        run: Folder for the log and the summary.
        metrics: The main figures, for KFP.
        rows: Folder of rows that prepare wrote (of several shards, the first one).
        more_rows: Folders or URIs of the other shards.
        projections: Folder of every W that projections wrote, where a teacher has one.
        modes: Loss mode of each cross-tokenizer teacher by its id, as overlap prints them.
        scores: Folders or URIs that score wrote, teacher after teacher, of each one a folder per shard of rows.
        standing: Names of the candidates that have come through the rung before, best first; none on the first one.
        place: Which of them is run, from 0.
        checkpoints: Folder or URI for checkpoints from which an interrupted training resumes; none by default.

    Returns:
        result: What the run came to, as JSON without quotes; of an empty name where no candidate is left for this place.
        started: When this step started (Unix time).
        seconds: How long it took.
    """
    from xtoken_core.workflow.step import step

    with step(f"trial {rung}-{place}", run) as times:
        from pathlib import Path

        from xtoken_core.training.inputs import TrainingInputs, by_teacher
        from xtoken_core.workflow.figures import log_figures, trial_figures
        from xtoken_core.workflow.pilot import run_place
        from xtoken_core.workflow.rungs import Place
        from xtoken_core.workflow.views import View
        from xtoken_core.workflow.vocabularies import matrices

        parsed = View.from_text(spec)
        w = matrices(parsed, projections.path if projections else None)
        inputs = TrainingInputs((rows.path, *more_rows), modes, w, by_teacher(parsed, scores) if scores else {})
        uris = [rows.uri, projections.uri if projections else "", *scores]
        found = run_place(parsed, Place.of(candidates, standing, place, rung, share), inputs, Path(run.path), checkpoints, uris)
        log_figures(metrics, trial_figures(found))
        return (found.to_parameter(), *times().values())


if __name__ == "__main__":
    main(trial)
