"""Train the student on several hosts: distill, by way of a Kubeflow TrainJob."""

from kfp.dsl import Artifact, Input, Model, Output

from components.cli import component, main


@component
def launch(
    spec: str,
    run: Output[Model],
    rows: list,
    resources: str,
    modes: dict = {},  # noqa: B006 - KFP reads the default
    baseline: bool = False,
    checkpoints: str = "",
    projection_0: Input[Artifact] = None,
    projection_1: Input[Artifact] = None,
    projection_2: Input[Artifact] = None,
    projection_3: Input[Artifact] = None,
    projection_4: Input[Artifact] = None,
    projection_5: Input[Artifact] = None,
    projection_6: Input[Artifact] = None,
    projection_7: Input[Artifact] = None,
):
    """Create a TrainJob that trains the student on several hosts, print its log, and end as it ends.

    Rows, projections and the run are URIs that every host reaches; the hosts publish the run themselves.

    Args:
        spec: Student, teachers, loss and training are read.
        run: Where the hosts publish the trained student, its log and its summary.
        rows: URIs of the rows that prepare wrote, one per shard.
        resources: The spec's resources, as JSON: image, hosts and what each gets.
        modes: Loss mode of each cross-tokenizer teacher by its id, as overlap prints them.
        baseline: Cross-entropy alone, on the same rows in the same order.
        checkpoints: URI for checkpoints from which an interrupted training resumes; none by default.
        projection_0: W of teacher 0, where it has one.
        projection_1: W of teacher 1.
        projection_2: W of teacher 2.
        projection_3: W of teacher 3.
        projection_4: W of teacher 4.
        projection_5: W of teacher 5.
        projection_6: W of teacher 6.
        projection_7: W of teacher 7.
    """
    from xtoken_core.workflow.step import step

    slots = (projection_0, projection_1, projection_2, projection_3, projection_4, projection_5, projection_6, projection_7)
    with step("distill-baseline" if baseline else "distill", run):
        from xtoken_core.workflow.trainjob import launch

        matrices = {index: slot.uri for index, slot in enumerate(slots) if slot}
        launch(spec, resources, rows, run.uri, modes, matrices, baseline, checkpoints)


if __name__ == "__main__":
    main(launch)
