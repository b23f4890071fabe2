"""Turn documents into tokenized, aligned, cut rows."""

from typing import NamedTuple

from kfp.dsl import Dataset, Output

from components.cli import component, main


@component
def prepare(spec: str, rows: Output[Dataset], shard: int = 0) -> NamedTuple("Outputs", [("uri", str)]):  # type: ignore[valid-type]
    """Tokenize and align the documents for the student and every teacher, once.

    Prints where the rows lie.

    Args:
        spec: Student, teachers and data are read.
        rows: Folder for the rows, train and validation (Arrow).
        shard: Which of data.shards shares of the documents; shard 0 also does the validation documents.

    Returns:
        uri: Where the rows lie.
    """
    from xtoken_core.workflow.step import step

    with step("prepare", rows):
        from xtoken_core.data.prepare import prepare_rows
        from xtoken_core.data.rows import load_sides
        from xtoken_core.workflow.views import View

        parsed = View.from_text(spec)
        sides = load_sides(parsed)
        prepare_rows(parsed, f"{rows.path}/train", "train", shard, sides)
        if shard == 0 and parsed.data.validation:
            prepare_rows(parsed, f"{rows.path}/validation", "validation", sides=sides)
        return (rows.uri,)


if __name__ == "__main__":
    main(prepare)
