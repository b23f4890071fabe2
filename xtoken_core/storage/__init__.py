"""Files wherever they lie: local paths and fsspec URIs (`s3://`, `file://`, `memory://`, ...), read once and published whole.

Endpoint and credentials come from the environment as AWS tools take them (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).
Relative paths are relative to the working directory. Everything a user can get wrong raises `InputError`.
"""

from xtoken_core.storage.ownership import RUN_FILE, check_replaceable, check_writable
from xtoken_core.storage.places import filesystem
from xtoken_core.storage.publishing import publish
from xtoken_core.storage.reading import INCOMPLETE, cache_folder, expand, fingerprint, folders, local_copy, open_text, remove
from xtoken_core.storage.uris import is_remote, normalize

__all__ = [
    "INCOMPLETE",
    "RUN_FILE",
    "cache_folder",
    "check_replaceable",
    "check_writable",
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
]
