"""What a notebook shows of a run: a bar over its steps, and one over the optimizer steps of the training at work."""

from __future__ import annotations

import re
import sys
from typing import Any

from tqdm.auto import tqdm

from pipelines.status import Status

TRAINING = re.compile(r"step +(\d+)/(\d+) +(.*)")
"""A line of the training: optimizer step, of how many, and what it was like."""


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class Bars:
    """The bars of one run; each shows what its `Status` says."""

    def __init__(self, steps: int):
        self.run = tqdm(total=steps, unit="step")
        self.training: Any = None
        self.trained = ""
        """The step whose training the second bar shows."""

    def show(self, status: Status) -> None:
        """Moves the bars to where the run is."""
        self.run.set_description(status.task, refresh=False)
        self.run.n = status.tasks if status.state == "succeeded" else max(status.count - 1, 0)
        self.run.refresh()
        if found := TRAINING.match(status.line):
            if self.training is None or self.trained != status.task:
                self._end_training()
                self.training, self.trained = tqdm(total=int(found[2]), desc=status.task, leave=False), status.task
            self.training.set_postfix_str(found[3], refresh=False)
            self.training.n = int(found[1])
            self.training.refresh()

    def close(self) -> None:
        """Leaves the bar of the run as it is, and takes the other one away."""
        self._end_training()
        self.run.close()

    def _end_training(self) -> None:
        if self.training is not None:
            self.training.close()
