"""Train the student against its teachers."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components.cli import component, main


@component
def distill(
    spec: str,
    run: Output[Model],
    rows: Input[Dataset],
    more_rows: list = [],  # noqa: B006 - KFP reads the default
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
    """Train the student on the teachers' distributions and the text, or (baseline) on the text alone.

    Args:
        spec: Student, teachers, loss and training are read.
        run: Folder for the trained student (best and last), its log and its summary.
        rows: Folder of rows that prepare wrote (of several shards, the first one).
        more_rows: Folders or URIs of the other shards.
        modes: Loss mode of each cross-tokenizer teacher by its id, as overlap prints them.
        baseline: Cross-entropy alone, on the same rows in the same order.
        checkpoints: Folder or URI for checkpoints from which an interrupted training resumes; none by default.
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
    from xtoken_core.workflow.versions import own_folder

    slots = (projection_0, projection_1, projection_2, projection_3, projection_4, projection_5, projection_6, projection_7)
    with step("distill-baseline" if baseline else "distill", run):
        from xtoken_core.spec import DistillationSpec
        from xtoken_core.storage import remove
        from xtoken_core.training.distill import distill
        from xtoken_core.training.inputs import TrainingInputs

        parsed = DistillationSpec.from_text(spec)
        matrices = {t.id: f"{slot.path}/projection.safetensors" for t, slot in zip(parsed.teachers, slots) if slot}
        used = [rows.uri, *more_rows, *(slot.uri for slot in slots if slot)]
        own = own_folder(checkpoints, spec, str(modes), str(baseline), *used)
        inputs = TrainingInputs((rows.path, *more_rows), modes, matrices)
        distill(parsed, inputs, run.path, baseline=baseline, checkpoint_uri=own)
        for leftover in (f"{run.path}/checkpoints", own):  # the state of optimizers, of no use from here on
            if leftover:
                remove(leftover)


if __name__ == "__main__":
    main(distill)
