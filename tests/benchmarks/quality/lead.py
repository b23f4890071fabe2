"""A teacher that is little ahead of the student, small enough for a CPU: `python -m tests.benchmarks.quality.lead STUDENT CODER OTHER DATA OUT [ARM:SEED ...]`

DATA is what `python -m tests.benchmarks.quality prepare` made of mixed text for these two teachers. The rows, steps and rates are those of
`shares`; each teacher has its own half of the rows, its 64 likeliest cells stored. Arms:

    both      each teacher on its half, to the end
    lead-0.1  the second one as long as it is ahead on held-out text of its half by this share, asked every 10 steps: `teachers[].lead`

A line of JSON an arm is added to OUT: held-out bits per byte at half of the steps and at the end, and what was asked on the way.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.quality.rows import Rows
from tests.benchmarks.quality.shares import HELD_OUT, LENGTH, bits, cropped, scores, teacher_of, train, training_rows
from xtoken_core.losses import TeacherBatch
from xtoken_core.models import load_model
from xtoken_core.projection import Projection

EVERY = 10
"""Steps between two questions."""


def other_bits(other: str, path: Path, vocabulary: int) -> float:
    """Bits per byte of the second teacher on the first tokens of held-out rows, as it reads them."""
    rows = Rows.as_teacher(path, torch.device("cpu"), 1).arrays
    return bits(load_model(other).eval(), Rows({name: array[:HELD_OUT, :LENGTH] for name, array in rows.items()}), vocabulary)


def heard(teacher: TeacherBatch, silent: bool) -> TeacherBatch:
    """A teacher as it is heard: as it is, or of nothing."""
    assert teacher.taught is not None
    return replace(teacher, taught=teacher.taught & (not silent))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.quality.lead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name, kind in {"student": str, "coder": str, "other": str, "data": Path, "out": Path}.items():
        parser.add_argument(name, type=kind)
    parser.add_argument("runs", nargs="*", default=["both:0", "lead-0:0", "lead-0.1:0"])
    options = parser.parse_args()
    rows = training_rows(options.data)
    projections = [Projection.load(options.data / f"w-{number}.safetensors") for number in (0, 1)]
    held_out = {path.stem: cropped(path) for path in sorted(options.data.glob("*.npz")) if path.stem != "train"}
    vocabulary, theirs = len(projections[0].indices), projections[1].teacher_vocab_size
    assert theirs is not None
    said = [scores(name, projections[n], rows, n) for n, name in enumerate((options.coder, options.other))]
    name = max(held_out)  # `english` after `code`
    theirs_at = other_bits(options.other, options.data / f"{name}.npz", theirs)
    for run in options.runs:
        arm, _, seed = run.partition(":")
        model, asked = load_model(options.student).train(), dict[int, float]()

        def hear(
            step: int, index: Tensor, arm: str = arm, model: Any = model, asked: dict[int, float] = asked
        ) -> list[TeacherBatch]:
            if step % EVERY == 0:
                asked[step] = bits(model, held_out[name], vocabulary)
            ahead = arm == "both" or theirs_at <= (1 - float(arm.removeprefix("lead-"))) * list(asked.values())[-1]
            return [heard(teacher_of(n, rows, index, said[n], projections[n]), n == 1 and not ahead) for n in (0, 1)]

        def measure(model: Any = model) -> dict[str, float]:
            return {name: bits(model, own, vocabulary) for name, own in held_out.items()}

        line = train((arm, int(seed or 0)), model, rows, vocabulary, hear, measure)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"other": theirs_at, "asked": asked}) + "\n")


if __name__ == "__main__":
    main()
