"""What a person sees of a local run: a line a step, the lines of long ones, and the file that `xtoken status` reads."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipelines.bars import Bars, in_notebook
from pipelines.status import Status


class Progress(io.TextIOBase):
    """Stands in for stdout while KFP runs: everything goes to a log file, and what a person wants to see on the terminal."""

    def __init__(self, raw: IO[str], status: Status):
        self.raw, self.out = raw, sys.stdout
        self.folder = Path(status.log).parent
        self.status = status.tell(self.folder)
        self.begun, self.inside, self.line = 0.0, False, ""
        self.bars = Bars(status.tasks) if in_notebook() else None

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Takes over stdout and KFP's messages."""
        handler = logging.StreamHandler(self)  # for the one message that KFP gives no handler to: that of its cache
        handler.addFilter(lambda record: "cache hit" in record.getMessage())
        logger = logging.getLogger()
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            with contextlib.redirect_stdout(self), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
            self.status = self.status.tell(self.folder, state="succeeded")
        except Exception:
            self.status = self.status.tell(self.folder, state="failed")
            raise
        except BaseException:
            self.status = self.status.tell(self.folder, state="interrupted")
            raise
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            if self.bars is not None:
                self.bars.show(self.status)
                self.bars.close()

    def write(self, text: str) -> int:
        """Takes text as it comes, and handles each line when it is complete."""
        self.raw.write(text)
        self.raw.flush()
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self._handle(re.sub(r"\x1b\[\d*m", "", line))
        return len(text)

    def say(self, line: str) -> None:
        """Prints one line on the terminal."""
        self.out.write(line + "\n")
        self.out.flush()

    def _tell(self, line: str) -> None:
        """Prints a line, or in a notebook moves the bars."""
        if self.bars is None:
            self.say(line)
        else:
            self.bars.show(self.status)

    def _handle(self, line: str) -> None:
        message = re.sub(r"^\d\d:\d\d:\d\d\.\d{3} - \w+ - ", "", line)
        if found := re.match(r"Task (\S+) cache hit", message):
            self._begin(found[1])
            self._tell(f"{self._place()} {found[1]}: unchanged, its earlier result is used")
        elif found := re.match(r"Executing task '(\S+)'", message):
            self._begin(found[1])
            self._tell(f"{self._place()} {found[1]}")
        elif found := re.match(r"Task '(\S+)' finished with status (\w+)", message):
            verb = "done" if found[2] == "SUCCESS" else "failed"
            self._tell(f"{self._place()} {found[1]}: {verb} after {time.monotonic() - self.begun:.1f} s")
            self.inside = False
        elif re.fullmatch(r"    [\w -]+: (started|done in [\d.]+ s)", line):  # around them, KFP speaks (see `workflow.step`)
            self.inside = line.endswith("started")
        elif self.inside and line.strip():
            told = re.sub(r"\[KFP Executor [^\]]*\]: ", "", line)
            self.status = self.status.tell(self.folder, line=told.strip())
            self._tell(f"      {told}")

    def _begin(self, task: str) -> None:
        self.begun, self.inside = time.monotonic(), False
        self.status = self.status.tell(self.folder, task=task, count=self.status.count + 1, line="")

    def _place(self) -> str:
        return f"[{self.status.count:>{len(str(self.status.tasks))}}/{self.status.tasks}]"
