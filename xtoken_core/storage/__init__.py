"""Files wherever they lie: local paths and fsspec URIs (`s3://`, `file://`, `memory://`, ...), read once and published whole.

Endpoint and credentials come from the environment as AWS tools take them (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).
Relative paths are relative to the working directory. Everything a user can get wrong raises `InputError`.
"""

from xtoken_core.storage.claims import claimed
from xtoken_core.storage.ownership import MANIFEST, RUN_FILE, Manifest, check_place, check_space
from xtoken_core.storage.places import filesystem
from xtoken_core.storage.publishing import clear_leftovers, publish
from xtoken_core.storage.reading import (
    INCOMPLETE,
    cache_folder,
    expand,
    fingerprint,
    folders,
    local_copy,
    open_text,
    remove,
    size,
)
from xtoken_core.uris import is_remote, normalize

__all__ = [
    "INCOMPLETE",
    "MANIFEST",
    "RUN_FILE",
    "Manifest",
    "cache_folder",
    "check_place",
    "check_space",
    "claimed",
    "clear_leftovers",
    "expand",
    "filesystem",
    "fingerprint",
    "folders",
    "is_remote",
    "local_copy",
    "normalize",
    "open_text",
    "publish",
    "remove",
    "size",
]
