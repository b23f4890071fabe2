"""The notebooks of examples/: their cells, one after the other, as a kernel would run them."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support.tiny import tiny_run

EXAMPLES = Path(__file__).parents[1] / "examples"


def cells(name: str) -> list[str]:
    notebook = json.loads((EXAMPLES / name).read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "clear the outputs"
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(name: str) -> dict:
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells(name)):
        exec(compile(cell, f"{name}[{number}]", "exec"), names)
    return names


@pytest.mark.slow
def test_first_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tiny_run(tmp_path, teachers=1)))
    result = execute("first_run.ipynb")["result"]
    told = capsys.readouterr().out
    assert result.verdict.headline in told and Path(result.report).exists() and "distill: done after" in told


def test_your_own_loss_term():
    names = execute("your_own_loss_term.ipynb")
    assert names["student_logits"].grad.isfinite().all() and names["out"].loss > 0
