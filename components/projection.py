"""Build, or fetch and check, the projection matrix W of one teacher."""

from kfp.dsl import Artifact, Output

from components.cli import component, main


@component
def projection(spec: str, matrix: Output[Artifact], teacher: str = ""):
    """Build the projection matrix from the student's vocabulary to a teacher's.

    Args:
        spec: Student and teachers are read.
        matrix: Folder for projection.safetensors and stats.json.
        teacher: Id of the teacher; may be left out where the spec has one.
    """
    from pathlib import Path

    from xtoken_core.workflow.step import step

    with step("projection", matrix):
        from xtoken_core.spec import DistillationSpec
        from xtoken_core.workflow.vocabularies import write_projection

        Path(matrix.path).mkdir(parents=True, exist_ok=True)
        write_projection(DistillationSpec.from_text(spec), teacher, matrix.path)


if __name__ == "__main__":
    main(projection)
