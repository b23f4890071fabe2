"""What a URI says by itself: whether it is remote, its plain form, and whether it carries keys."""

from __future__ import annotations

import os
import re

_KEYS = re.compile(
    r"(?P<before>[A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^/\s]*@"
    r"|(?P<query>[?&](?:[\w-]*(?:signature|credential|token|secret|password|accesskeyid)|sig|key)=)[^&\s]*",
    re.IGNORECASE,
)
"""User names, passwords and keys before an `@`, and in the query of a signed URL."""


def is_remote(uri: str) -> bool:
    """Whether `uri` names something that is not on the local file system."""
    return "://" in uri and not uri.startswith("file://")


def normalize(uri: str) -> str:
    """`file:///x` as `/x`, `~/x` under the home folder, and KFP's own `minio://bucket/x` as `s3://bucket/x`; others as they are."""
    if is_remote(uri):
        return uri.replace("minio://", "s3://", 1)
    return os.path.expanduser(uri.removeprefix("file://"))


def has_keys(uri: str) -> bool:
    """Whether `uri` carries a user name, password, key or signature, which would end in logs and reports."""
    return _KEYS.search(uri) is not None


def without_keys(text: str) -> str:
    """The text with `***` in place of what its URIs carry of user names, passwords, keys and signatures."""
    return _KEYS.sub(lambda found: f"{found['before']}***@" if found["before"] else f"{found['query']}***", text)
