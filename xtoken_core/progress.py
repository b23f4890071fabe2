"""Progress bars: moved often where somebody watches, now and then in a log; of what is soon over there is none."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

DELAY = 2.0
"""Seconds that something must take before its bar is shown."""


def bar(description: str, **options: Any) -> Any:
    """A bar of tqdm, whose `options` say what is counted."""
    return tqdm(desc=description, mininterval=0.5 if sys.stderr.isatty() else 15, delay=DELAY, **options)
