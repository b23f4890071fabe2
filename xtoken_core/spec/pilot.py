"""Section `pilot`: short runs before the big one, which say whether and how to distil."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from xtoken_core.spec.section import Section, Strings

CE = "ce"
"""The candidate that is always there: cross-entropy only."""

_CHANGED = re.compile(
    r"loss\.\w+|teachers\.[a-z0-9-]+\.(weight|mode|domains)"
    r"|training\.(learning_rate|scheduler|warmup_steps|weight_decay|max_grad_norm)"
)


class CandidateSpec(Section):
    """One way to distil that the pilot tries."""

    name: str = Field(pattern=r"^[a-z0-9-]+$", max_length=40, description="names the candidate in tasks and figures")
    teachers: Strings | None = Field(
        None, min_length=1, description="ids of the teachers that it learns from; default: all", examples=[["qwen"]]
    )
    set: Strings = Field(
        (),
        description="changes to the spec, as --set takes them: of loss, the teachers' weight, mode and domains, and training's rates",
        examples=[["loss.mode=p_kl", "training.learning_rate=1e-4"]],
    )

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        if self.name == CE:
            yield f"name: {CE} is the candidate without teachers, which is always there"
        for change in self.set:
            key = change.partition("=")[0]
            if not _CHANGED.fullmatch(key):
                yield (
                    f"set: {key[:80]}: a candidate changes loss, teachers.ID.weight, mode and domains, "
                    "and training's learning_rate, scheduler, warmup_steps, weight_decay and max_grad_norm only"
                )


class PilotSpec(Section):
    """Short runs of several candidates, and of cross-entropy only, from which the gain of the whole run is told beforehand."""

    candidates: Annotated[tuple[CandidateSpec, ...], Field(strict=False, min_length=1, max_length=16)] = Field(
        description="ways to distil"
    )
    budget: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="optimizer steps of all short runs together, as a share of the main run's"
    )
    then: Literal["stop", "best"] = Field(
        "stop", description="what follows: nothing, or the main run as the best candidate (which may be cross-entropy only)"
    )

    def contradictions(self) -> Iterator[str]:
        """Yields what of the section does not go together."""
        names = [candidate.name for candidate in self.candidates]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield f"candidates.{index} ({name}): name: used by an earlier candidate"
