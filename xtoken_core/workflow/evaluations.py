"""The evaluations of one step, and the folder of their results."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

import torch

from xtoken_core.checksums import same_files
from xtoken_core.evaluation.evaluate import evaluate
from xtoken_core.results.evaluation import Evaluation
from xtoken_core.spec import DistillationSpec
from xtoken_core.storage import MANIFEST
from xtoken_core.workflow.subjects import Group, subjects


def evaluate_group(
    spec: DistillationSpec,
    group: Group,
    folder: str | Path,
    run: str | Path | None = None,
    rows: str | Path | None = None,
    projections: Mapping[str, Path] | None = None,
    modes: Mapping[str, str] | None = None,
) -> list[Evaluation]:
    """Measures everybody of a group, one after another; returns the results, and writes each to `folder`, which is made.

    A last checkpoint that is the best one too is measured once.

    `run`: the folder that a training wrote, for a group that is trained. `rows`, `projections`, `modes`: as of `evaluate`, for the
    agreement with the teachers. Raises InputError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained, everybody = group in (Group.AFTER, Group.BASELINE), subjects(spec, group)
    results: list[Evaluation] = []
    for subject in everybody:
        checkpoint = f"{run}/{subject.state}" if trained else None
        if checkpoint and results and same_files(Path(checkpoint), Path(results[0].model)):
            print(f"{subject.key} is {results[0].subject.key}", flush=True)
            results.append(results[0].model_copy(update={"subject": subject, "model": checkpoint, "agreement": {}}))
            results[-1].write(folder / f"{subject.key}.json")
            continue
        print(f"evaluating {subject.key}", flush=True)
        # The agreement costs a pass of every teacher; the best checkpoint, or the only one, tells what distillation has changed.
        compared = rows if subject == everybody[0] else None
        results.append(evaluate(spec, subject, checkpoint, compared, projections, modes))
        results[-1].write(folder / f"{subject.key}.json")
        gc.collect()  # the model's memory is the next one's
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def read_evaluations(folder: str | Path) -> list[Evaluation]:
    """The results in a folder that `evaluate_group` wrote. Raises InputError."""
    return [Evaluation.read(path) for path in sorted(Path(folder).glob("*.json")) if path.name != MANIFEST]
