"""The property tests give the same verdict whenever and beside whatever they run."""

import sys
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def tried() -> list[tuple[str, int]]:
    seen = []

    @given(st.text(), st.integers())
    def collect(text, number):
        seen.append((text, number))

    collect()
    return seen


@pytest.mark.skipif(not settings().derandomize, reason="exploring")
def test_examples_do_not_depend_on_what_is_imported(tmp_path, monkeypatch):
    before = tried()
    module = ModuleType("constants")
    (tmp_path / "constants.py").write_text(f"{[f'constant {number}' for number in range(100)]}")
    module.__file__ = str(tmp_path / "constants.py")
    monkeypatch.setitem(sys.modules, "constants", module)
    assert tried() == before
