"""Measure one model: a teacher, the student before, or a checkpoint of a trained one."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components.cli import component, main


@component
def evaluate(
    spec: str,
    who: str,
    result: Output[Artifact],
    run: Input[Model] = None,
    rows: Input[Dataset] = None,
    modes: dict = {},  # noqa: B006 - KFP reads the default
    projection_0: Input[Artifact] = None,
    projection_1: Input[Artifact] = None,
    projection_2: Input[Artifact] = None,
    projection_3: Input[Artifact] = None,
    projection_4: Input[Artifact] = None,
    projection_5: Input[Artifact] = None,
    projection_6: Input[Artifact] = None,
    projection_7: Input[Artifact] = None,
):
    """Measure bits per byte on held-out text, the tasks of the spec, and a student's agreement with its teachers.

    Args:
        spec: Student, teachers, data and evaluation are read.
        who: teacher-<id>, student_before, student_after_best, student_after_last, baseline_best or baseline_last.
        result: The figures, as JSON.
        run: The folder that distill wrote, for who is trained.
        rows: Folder of rows that prepare wrote (shard 0), for the agreement with the teachers.
        modes: Loss mode of each cross-tokenizer teacher by its id, as overlap prints them, for the agreement.
        projection_0: W of teacher 0, where it has one, for the agreement.
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
    with step(f"evaluate {who}", result):
        from xtoken_core.evaluation.evaluate import evaluate
        from xtoken_core.spec import DistillationSpec

        parsed = DistillationSpec.from_text(spec)
        matrices: dict = {t.id: f"{slot.path}/projection.safetensors" for t, slot in zip(parsed.teachers, slots) if slot}
        checkpoint = f"{run.path}/{who.rsplit('_', 1)[-1]}" if run else None
        evaluate(parsed, who, checkpoint, result.path, rows=rows and rows.path, projections=matrices, modes=modes)


if __name__ == "__main__":
    main(evaluate)
