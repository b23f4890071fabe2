"""The order of the tests on a GPU."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts those of the kernels last: they are many and short, and fill the workers while whole trainings run."""
    items.sort(key=lambda item: item.path.parts[-2:] == ("gpu", "test_kernels.py"))
