"""Build, or fetch and check, the projection matrix W of every teacher."""

from kfp.dsl import Artifact, Output

from components.cli import component, main


@component
def projection(
    spec: str,
    matrices: Output[Artifact],
    rows: list = [],  # noqa: B006 - KFP reads the default
):
    """Build the projection matrix from the student's vocabulary to that of every teacher that the spec projects to.

    Args:
        spec: Student and teachers are read.
        matrices: Folder for the W of each teacher (<teacher>.safetensors) and its figures (<teacher>.json).
        rows: Folders or URIs of rows that prepare wrote, all shards; cells that they show together are joined.
    """
    from xtoken_core.workflow.step import step

    with step("projections", matrices):
        from xtoken_core.workflow.views import View
        from xtoken_core.workflow.vocabularies import write_projections

        write_projections(View.from_text(spec), matrices.path, rows)


if __name__ == "__main__":
    main(projection)
