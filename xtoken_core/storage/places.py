"""The file system behind a URI, and one line for whatever it refuses."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from xtoken_core.errors import InputError, in_one_line
from xtoken_core.uris import has_keys, is_remote, normalize, without_keys

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)

WARNING_SECONDS = 30.0
"""Between two lines that say that a store does not answer."""

PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hdfs", "webhdfs", "hf", "http", "https", "memory")
"""Where models, data and runs may lie. fsspec knows more, among them ones that log in or run commands when they are named."""

LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "huggingface_hub", "httpx")
"""Whose own errors say what is wrong with a place. Of fsspec's they are ValueErrors too, for names that cannot be."""

ATTEMPTS = 8
"""Of one request to an object store, by botocore's own rules: with pauses that grow to 20 s, and none for what fails for good."""


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of `uri` and the path on it. Raises InputError for keys in it and for an unknown protocol."""
    import fsspec

    if "\0" in uri:
        raise InputError(f"{uri!r}: holds a null character")
    scheme, _, rest = uri.partition(":/")
    if scheme in (*PROTOCOLS, "file") and rest[:1] != "/" and not os.path.exists(uri):
        raise InputError(f"{uri}: one slash is missing: {scheme}://{rest}")
    if has_keys(uri):
        raise InputError(f"{without_keys(uri)}: carries a user name, key or signature; credentials come from the environment")
    place = normalize(uri)
    protocol = place.partition("://")[0]
    if is_remote(place) and protocol not in PROTOCOLS:
        raise InputError(f"{uri}: {protocol}:// is not among {', '.join(PROTOCOLS)}")
    if not is_remote(place):  # fsspec would take `data:,x` and `zip::x` for file systems of their own
        local = fsspec.filesystem("file")
        return local, str(local._strip_protocol(place)).rstrip("/")
    if "::" in place:
        raise InputError(f"{uri}: holds ::, by which fsspec chains file systems")
    with reported(uri):
        try:
            fs, path = fsspec.core.url_to_fs(place, **_options(protocol))
        except (ImportError, ValueError) as e:
            raise InputError(f"{uri}: {in_one_line(e)}") from None
    if protocol != "memory" and not path.strip("/"):
        raise InputError(f"{uri}: names no bucket or host")
    if "s3" in fs.protocol and fs.session is None:
        fs.session = _telling_session()
    return fs, path.rstrip("/")


def _telling_session() -> Any:
    """What s3fs makes its client of, which says when the store does not answer: retries alone may take many minutes."""
    from aiobotocore.session import AioSession

    session, told = AioSession(), -math.inf

    def tell(endpoint: Any, attempts: int, caught_exception: Exception | None, **_: Any) -> None:
        nonlocal told
        if caught_exception is not None and time.monotonic() - told >= WARNING_SECONDS:
            told = time.monotonic()
            logger.warning(
                "%s: no answer at attempt %d: %s", without_keys(endpoint.host), attempts, in_one_line(caught_exception)
            )

    session.register("needs-retry.s3", tell)
    return session


def _options(protocol: str) -> dict[str, Any]:
    """botocore's retries, unless the environment sets them as AWS tools take them."""
    if protocol not in ("s3", "s3a") or {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & set(os.environ):
        return {}
    return {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": ATTEMPTS}}}


@contextlib.contextmanager
def reported(uri: str) -> Iterator[None]:
    """Turns what storage can raise into one line that names the URI."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{uri}: no such file or folder") from None
    except PermissionError as e:
        raise InputError(f"{uri}: not allowed: {in_one_line(e)}") from None
    except OSError as e:
        raise InputError(f"{uri}: {' '.join((e.strerror or in_one_line(e)).split())}") from None
    except Exception as e:
        if type(e).__module__.split(".")[0] in LIBRARIES or (isinstance(e, ValueError) and is_remote(uri)):
            raise InputError(f"{uri}: {in_one_line(e)}") from None
        raise
