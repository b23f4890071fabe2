"""Free ports for programs that have to be told theirs."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket

FIRST, SHARE = 12_000, 1_000
"""Below those that the system gives to whoever asks for any (32768 and up), which could be gone before they are used; each
process of the tests has a share of its own."""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    share = FIRST + SHARE * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    begin, found = secrets.randbelow(SHARE), list[int]()
    for number in range(SHARE):
        port = share + (begin + number) % SHARE
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"{count} ports are not to be had from {share} on")
