"""Whether a run may be published at a place: better known before the training than after it."""

from __future__ import annotations

import os

from xtoken_core.errors import InputError
from xtoken_core.storage.places import filesystem, reported
from xtoken_core.storage.reading import INCOMPLETE

RUN_FILE = "run.json"
"""What a published run is known by: the data that its report was made from."""


def check_writable(uri: str) -> None:
    """Raises InputError unless something can be written beside `uri`."""
    fs, target = filesystem(uri)
    probe = f"{os.path.dirname(target)}/.{os.path.basename(target)}.probe"
    with reported(uri):
        fs.makedirs(os.path.dirname(target), exist_ok=True)
        fs.pipe_file(probe, b"probe")
        fs.rm_file(probe)


def check_replaceable(uri: str) -> None:
    """Raises InputError if something else than a run lies at `uri`: publishing replaces all of it."""
    fs, target = filesystem(uri)
    with reported(uri):
        fs.invalidate_cache()
        if not any(fs.exists(f"{target}/{name}") for name in (RUN_FILE, INCOMPLETE)) and fs.find(target):
            raise InputError(
                f"{uri}: holds other things (and no {RUN_FILE}), which publishing would replace; name a place of its own"
            )
