"""Build, or fetch and check, the projection matrix W of every teacher."""

from kfp.dsl import Artifact, Dataset, Input, Output

from components.cli import component, main


@component
def projection(
    spec: str,
    matrices: Output[Artifact],
    rows: Input[Dataset] = None,
    more_rows: list = [],  # noqa: B006 - KFP reads the default
):
    """Build the projection matrix from the student's vocabulary to that of every teacher that the spec projects to.

    Args:
        spec: Student and teachers are read.
        matrices: Folder for the W of each teacher (<teacher>.safetensors) and its figures (<teacher>.json).
        rows: Folder of rows that prepare wrote (of several shards, the first one); cells that rows show together are joined.
        more_rows: Folders or URIs of the other shards.
    """
    from xtoken_core.workflow.step import step

    with step("projections", matrices):
        from xtoken_core.workflow.views import View
        from xtoken_core.workflow.vocabularies import write_projections

        write_projections(View.from_text(spec), matrices.path, [*([rows.path] if rows else []), *more_rows])


if __name__ == "__main__":
    main(projection)
