"""Signs of life of a training's ranks: one that hangs is named, where a collective would only say that it waited too long."""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist

from xtoken_core.errors import RunError, in_one_line, leave_error

logger = logging.getLogger(__name__)

MEETING = "XTOKEN_MEETING"
"""Environment variable: the private folder in which the ranks of one host meet. Without it they meet at torchrun's store."""

PERIOD = 10.0
"""Seconds between two signs of life, where the limit is not shorter."""

STUCK = 1.25
"""Of the limit: how long all ranks may stay where they are. More than a teacher of one rank may take, less than a collective."""

END = 2**62
"""Places passed by a rank whose training is over: more than any other has."""


class Sign(NamedTuple):
    """What a rank tells the others; in the store it is a JSON list."""

    beat: int
    """Grows while it lives."""
    passed: int
    """Places."""
    place: str
    """Where it is."""
    who: str
    """Its host and process."""
    over: bool = False
    """Whether its training has ended."""


NOT_HEARD = Sign(0, 0, "setup", "not heard of yet")
"""In place of a rank's sign before its first."""


@dataclass
class Heard:
    """What is known of a rank."""

    sign: Sign
    """Its last one."""
    alive: float
    """When that changed (monotonic)."""


class Watch:
    """Tells the other ranks that this one lives and where it is, and ends this process with a line that names one that does not.

    All ranks pass the same places in the same order, so the one that others wait for has passed the fewest.
    """

    def __init__(self, rank: int, ranks: int, limit: float):
        """limit: seconds without a sign of life."""
        self._rank, self._ranks, self._limit = rank, ranks, limit
        self._passed, self._place = 0, "setup"
        self._moved = time.monotonic()
        self._over = threading.Event()

    def start(self) -> None:
        """Begins to watch, where there are others. They all must have joined the process group."""
        if self._ranks > 1:
            threading.Thread(target=self._watch, name="watch of the ranks", daemon=True).start()

    def at(self, place: str) -> None:
        """This rank has come to a place that all ranks come to."""
        self._passed, self._place, self._moved = self._passed + 1, place, time.monotonic()

    def stop(self) -> None:
        """The training is over; the others may take their time to end."""
        self._over.set()

    def _watch(self) -> None:
        period = min(PERIOD, self._limit / 4)
        try:
            store, count, began = _store(self._limit), 0, time.monotonic()
            heard = {rank: Heard(NOT_HEARD, began) for rank in range(self._ranks)}  # one may hang before its first sign
            while not self._over.wait(0 if count == 0 else period):
                count += 1
                sign = Sign(count, self._passed, self._place, f"{socket.gethostname()}, process {os.getpid()}")
                store.set(_key(self._rank), json.dumps(sign))
                heard[self._rank] = Heard(sign, time.monotonic())
                for rank in range(self._ranks):
                    if rank == self._rank or not store.check([_key(rank)]):
                        continue
                    told = Sign(*json.loads(store.get(_key(rank))))
                    if heard[rank].sign != told:
                        heard[rank] = Heard(told, time.monotonic())
                if fault := self._fault(heard):
                    self._end(fault)
            store.set(_key(self._rank), json.dumps(Sign(count + 1, END, "the end", "", over=True)))
        except RuntimeError as e:  # the store of another host; without it nothing is known of the others
            if not self._over.is_set():
                logger.warning("the ranks' signs of life cannot be exchanged any more: %s", in_one_line(e))

    def _fault(self, heard: dict[int, Heard]) -> str | None:
        """Which rank hangs, in words."""
        now = time.monotonic()
        for rank, of in sorted(heard.items()):
            if now - of.alive >= self._limit and not of.sign.over:
                return f"rank {rank} ({of.sign.who}): no sign of life for {self._limit:g} s; the last came from {of.sign.place}"
        last = min(heard, key=lambda rank: heard[rank].sign.passed)
        if self._passed == 0 or now - self._moved < STUCK * self._limit or heard[last].sign.passed == self._passed:
            return None  # or all are where this one is: their collective has a limit of its own
        sign, seconds = heard[last].sign, STUCK * self._limit
        return f"rank {last} ({sign.who}): does not come out of {sign.place}; the others have waited for it for {seconds:g} s"

    def _end(self, fault: str) -> None:
        """Ends this process, whose main thread waits in a collective and hears nothing."""
        logger.error("%s", fault)
        leave_error(RunError(fault))
        os._exit(1)


def _key(rank: int) -> str:
    return f"xtoken/rank/{rank}"


def _store(limit: float) -> dist.Store:
    """A connection of its own: that of the process group may be waiting."""
    if folder := os.environ.get(MEETING):
        return dist.FileStore(f"{folder}/signs", -1)
    wait = datetime.timedelta(seconds=limit)
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, wait)
