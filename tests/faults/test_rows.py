"""Rows whose numbers cannot be: a line, before an embedding reads beyond its end (on a GPU that would be an assertion of the driver)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets.arrow_writer import ArrowWriter

from tests.support.training_run import prepare, run
from xtoken_core.data.reading import load_rows
from xtoken_core.errors import InputError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def values(base):
    return prepare(base, teachers=1)


def rewritten(folder: Path, column: str, number: int) -> None:
    """One number of a column of the first row changed, and the file written again."""
    path = folder / "train" / "rows.arrow"
    rows = load_rows(folder / "train").with_format("arrow")[:]
    lists = rows[column].to_pylist()
    for row in lists:
        row[1] = number
    changed = rows.set_column(rows.column_names.index(column), column, pa.array(lists, type=pa.list_(pa.int64())))
    path.unlink()
    writer = ArrowWriter(path=str(path))
    writer.write_table(changed)
    writer.finalize()


@pytest.mark.parametrize("number", [2**31, -1, 400, np.iinfo(np.int64).max])
@pytest.mark.parametrize("column", ["student_ids", "teacher_other_ids"])
def test_ids_that_no_model_knows(base, values, tmp_path, fault, column, number):
    shutil.copytree(base / "rows", tmp_path / "rows")
    shutil.copy(base / "w.safetensors", tmp_path)
    rewritten(tmp_path / "rows", column, number)
    with pytest.raises(InputError, match=rf"^rows: {column}: {number} is not an id of its model, which knows \d+$") as told:
        run(values, tmp_path, tmp_path / "out")
    fault(f"{number} among {column}", "one line", told.value)


def test_a_chunk_that_is_not_there(base, values, tmp_path, fault):
    shutil.copytree(base / "rows", tmp_path / "rows")
    shutil.copy(base / "w.safetensors", tmp_path)
    rewritten(tmp_path / "rows", "teacher_other_student_chunk_id", 10_000)
    with pytest.raises(InputError, match=r"^rows: a token belongs to chunk 10000 of \d+$") as told:
        run(values, tmp_path, tmp_path / "out")
    fault("a chunk id beyond the chunks", "one line", told.value)


@pytest.mark.parametrize(
    "pads", [{}, {"student": 0}, {"student": 0, "teacher_other": -7}, {"student": 10**12, "teacher_other": 0}]
)
def test_rows_that_were_prepared_for_others(base, values, tmp_path, fault, pads):
    """Their list of filling ids lacks a teacher, or holds what is none."""
    shutil.copytree(base / "rows", tmp_path / "rows")
    shutil.copy(base / "w.safetensors", tmp_path)
    told = json.loads((tmp_path / "rows" / "train" / "rows.json").read_text()) | {"pads": pads}
    (tmp_path / "rows" / "train" / "rows.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"rows.json: pads: (student|teacher_other): no id; ") as refused:
        run(values, tmp_path, tmp_path / "out")
    fault(f"rows with the filling ids {pads}", "one line", refused.value)
