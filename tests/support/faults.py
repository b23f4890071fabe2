"""The table of faults that the tests inject: what was done, what is promised, what happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Tell = Callable[[str, str, Any], None]


@pytest.fixture
def fault(record_property) -> Tell:
    """A function that enters one line in the table: (fault, promise, what happened); of the last, the first line."""

    def tell(what: str, promise: str, happened: Any) -> None:
        record_property("fault", (what, promise, next(iter(str(happened).splitlines()), "")))

    return tell


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints the table at the end of a session, whichever process ran the tests."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.getreports(outcome) if r.when == "call"]
    rows = [value for report in reports for name, value in report.user_properties if name == "fault"]
    if not rows:
        return
    terminalreporter.section(f"{len(rows)} faults")
    for what, promise, happened in rows:
        terminalreporter.write_line(f"{what}  |  {promise}  |  {happened[:160]}")
