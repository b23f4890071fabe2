"""What a training run tells while it runs: log.jsonl for the report, a line or a bar for the person who watches."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10


class RunLog:
    """log.jsonl and the progress display of one run (of its first rank)."""

    def __init__(self, path: Path, max_steps: int, resumed_from: int | None):
        """Begins the log anew, or goes on after step `resumed_from`: lines of later steps, which a killed run has left, are dropped."""
        kept = [] if resumed_from is None else [line for line in _lines(path) if json.loads(line)["step"] <= resumed_from]
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(line + "\n" for line in kept)
        self._max_steps = max_steps
        self._bar = tqdm(total=max_steps, initial=resumed_from or 0, desc="distil", unit="step", disable=not sys.stderr.isatty())
        self._last_line = 0.0

    def write(self, entry: dict[str, Any]) -> None:
        """Appends one line; NaN and infinity become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def step(self, entry: dict[str, Any]) -> None:
        """Logs an optimizer step and shows it: on a bar, or where nobody watches as a plain line now and then."""
        self.write(entry)
        self._bar.update(entry["step"] - self._bar.n)
        self._bar.set_postfix_str(f"loss {entry['loss']:.3f}, {entry['tokens_per_second']:,.0f} tokens/s")
        last = entry["step"] >= self._max_steps
        if self._bar.disable and (last or time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = time.monotonic()
            self.say(
                f"step {entry['step']}/{self._max_steps}  loss {entry['loss']:.3f}  ce {entry['ce']:.3f}  kd {entry['kd']:.3f}  "
                f"{entry['tokens_per_second']:,.0f} tokens/s"
            )

    def say(self, message: str) -> None:
        """Prints one line."""
        tqdm.write(message, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes file and bar."""
        self._file.close()
        self._bar.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
