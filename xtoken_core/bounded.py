"""Calls with bounds on time and memory: for programs of others, such as chat templates, which may loop for ever or fill the memory."""

from __future__ import annotations

import gc
import os
import resource
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

SECONDS = 10.0
"""Processor time of one call."""
PATIENCE = 60.0
"""Seconds of one call, however little of them it had a processor."""
MEMORY = 2**30
"""Bytes of one call."""
LONGEST = 2**26
"""Characters of what is told."""


class Refused(Exception):
    """What a call raised, on one line."""


class Overrun(Refused):
    """A call went beyond its bounds, and told nothing."""


class Bounded:
    """A function from picklable arguments to a text, or a tuple that begins with one, called in a copy of this process.

    The copy is made at the first call, lives on for the next ones, and ends with this process or with `close`. The kernel ends it when a
    call takes too long: no Python has to run for that, which a single operation on a large number can prevent for hours.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._pipe: Connection | None = None
        self._copy = self._owner = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What the function returns. Raises Refused with what it raises, and Overrun beyond the bounds."""
        if self._pipe is None or self._owner != os.getpid():
            self._pipe = self._start()
        try:
            self._pipe.send((arguments, options))
            kind, result = self._pipe.recv()
        except (EOFError, OSError):
            self.close()
            raise Overrun(f"it does not end within {SECONDS:g} s") from None
        except BaseException:  # interrupted: an answer that is under way would be taken for that of the next call
            self.close()
            raise
        if kind is not None:
            raise kind(result)
        return result

    def close(self) -> None:
        """Ends the copy. Harmless when repeated."""
        if self._pipe is not None and self._owner == os.getpid():
            self._pipe.close()
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._copy, signal.SIGKILL)
                os.waitpid(self._copy, 0)
        self._pipe = None

    __del__ = close

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        self._owner = os.getpid()
        with warnings.catch_warnings(), _quiet_tokenizers():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads are gone in the copy, and it needs none of them
            self._copy = os.fork()
        if self._copy == 0:
            try:
                _serve(theirs, self._function)
            finally:
                os._exit(1)
        theirs.close()
        return ours


class _quiet_tokenizers:
    """Within, a fork is not worth a warning to tokenizers: the copy tokenizes nothing."""

    NAME = "TOKENIZERS_PARALLELISM"

    def __enter__(self) -> None:
        self.ours = self.NAME not in os.environ
        if self.ours:
            os.environ[self.NAME] = "true"

    def __exit__(self, *_: object) -> None:
        if self.ours:
            os.environ.pop(self.NAME, None)


def _serve(pipe: Connection, function: Callable[..., Any]) -> NoReturn:
    """Answers calls until the other end is closed."""
    gc.disable()  # what this process has is the other one's to finish
    for number, what in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, what)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    os.closerange(3, pipe.fileno())
    os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    with suppress(OSError, ValueError):  # only Linux tells it, and keeps to it
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + MEMORY,) * 2)
    while True:
        try:
            arguments, options = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        answer = _answer(function, arguments, options)
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        pipe.send(answer)


def _answer(function: Callable[..., Any], arguments: Any, options: Any) -> tuple[type[Refused] | None, Any]:
    try:
        result = function(*arguments, **options)
    except MemoryError:
        return Overrun, f"it needs more than {MEMORY // 2**20} MiB"
    except Exception as e:  # templates raise jinja2's errors, and whatever Python does with odd values
        return Refused, " ".join(str(e)[:1000].split())[:120]
    if len(result if isinstance(result, str) else result[0]) > LONGEST:
        return Overrun, f"it writes more than {LONGEST} characters"
    return None, result
