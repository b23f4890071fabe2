"""What a training run tells while it runs: log.jsonl for the report, a line or a bar for the person who watches."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Self

from tqdm import tqdm

from xtoken_core.results.training import LogLine

SECONDS_BETWEEN_LINES = 10


class RunLog:
    """log.jsonl and the progress display of one run (of its first rank)."""

    def __init__(self, path: Path, max_steps: int, resumed_from: int | None, kd_name: str = "kd"):
        """Begins the log anew, or adds to the one that came with the checkpoint of step `resumed_from`.

        kd_name: what plain lines call the KD term.
        """
        self._file = path.open("w" if resumed_from is None else "a", encoding="utf-8")
        self._max_steps, self._kd_name = max_steps, kd_name
        self._bar = tqdm(total=max_steps, initial=resumed_from or 0, desc="distil", unit="step", disable=not sys.stderr.isatty())
        self._last_line = 0.0
        self._first: tuple[int, float] | None = None

    def write(self, line: LogLine) -> None:
        """Appends one line."""
        self._file.write(line.model_dump_json(exclude_defaults=True) + "\n")
        self._file.flush()

    def step(self, line: LogLine) -> None:
        """Logs an optimizer step and shows it: on a bar, or where nobody watches as a plain line now and then."""
        self.write(line)
        self._bar.update(line.step - self._bar.n)
        self._bar.set_postfix_str(f"loss {line.loss:.3f}, {line.tokens_per_second:,.0f} tokens/s")
        last = line.step >= self._max_steps
        if self._bar.disable and (last or time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = time.monotonic()
            self.say(
                f"step {line.step}/{self._max_steps}  loss {line.loss:.3f}  ce {line.ce:.3f}  {self._kd_name} {line.kd:.3f}  "
                f"{line.tokens_per_second:,.0f} tokens/s{self._left(line.step)}"
            )

    def _left(self, step: int) -> str:
        """The time left at the pace of this process's steps; the first one also pays for what comes once."""
        if step >= self._max_steps:
            return ""
        if self._first is None:
            self._first = (step, time.monotonic())
            return ""
        begun, when = self._first
        pace = (time.monotonic() - when) / max(1, step - begun)
        return f"  {tqdm.format_interval(pace * (self._max_steps - step))} left"

    def say(self, message: str) -> None:
        """Prints one line."""
        tqdm.write(message, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes file and bar."""
        self._file.close()
        self._bar.close()
