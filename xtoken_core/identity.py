"""What is equal as data has the same name."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def identity(*parts: Any, length: int = 16) -> str:
    """The first hex digits of the SHA-256 of JSON values in canonical form: keys sorted, no blanks.

    Dicts that differ in the order of their keys only, which KFP and different processes change, have one identity.
    Raises TypeError or ValueError for what JSON cannot hold, NaN and infinity too.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
