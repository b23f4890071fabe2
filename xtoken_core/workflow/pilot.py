"""One short run of a pilot: trained as the main run would be, measured on the held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from xtoken_core.checksums import FILE as SEAL
from xtoken_core.data.statistics import rows_in
from xtoken_core.errors import NonFiniteError
from xtoken_core.evaluation.evaluate import held_out, load_for, measure_bits
from xtoken_core.results.evaluation import BitsPerByte, Documents
from xtoken_core.results.pilot import Blocks, Trial
from xtoken_core.results.subject import LAST
from xtoken_core.results.training import TrainingSummary, read_log
from xtoken_core.spec.pilot import CE
from xtoken_core.storage import remove
from xtoken_core.training.distill import distill
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.workflow.rungs import Place, trial_spec
from xtoken_core.workflow.versions import own_folder
from xtoken_core.workflow.views import View

MAX_BLOCKS = 64
"""Blocks of held-out documents that a trial is told by."""


def run_place(
    spec: View, place: Place, inputs: TrainingInputs, folder: Path, checkpoints: str = "", uris: Sequence[str] = ()
) -> Trial:
    """Trains and measures the candidate of one place; its log stays in `folder`, its student does not.

    One whose numbers stop being finite has failed, and the pilot goes on without it. `checkpoints`, `uris`: as of `own_folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if place.candidate is None:
        return Trial(candidate="", rung=place.rung)
    name = place.candidate.name
    tried = trial_spec(spec, place.candidate, place.share, rows_in(inputs.rows))
    own = own_folder(checkpoints, tried, inputs, name == CE, uris)
    print(f"{name}: {tried.training.max_steps} steps", flush=True)
    try:
        summary = distill(tried, inputs, folder, baseline=name == CE, checkpoint_uri=own)
        trial = _measured(tried, place, summary, folder)
    except NonFiniteError as e:
        trial = Trial(candidate=name, rung=place.rung, steps=tried.training.max_steps, failed=str(e))
    for leftover in (*(str(folder / part) for part in ("last", "best", "checkpoints", SEAL)), *([own] if own else [])):
        remove(leftover)
    print(f"{name}: {trial.failed or f'{trial.bits_per_byte:.4f} bits per byte'}", flush=True)
    return trial


def _measured(spec: View, place: Place, summary: TrainingSummary, folder: Path) -> Trial:
    """What a trained student came to."""
    assert place.candidate is not None
    loaded, _ = load_for(spec, LAST, folder / "last")
    measured, _ = measure_bits(spec, loaded, held_out(spec))
    seconds = [line.seconds_step for line in read_log(folder / "log.jsonl") if line.seconds_step is not None]
    return Trial(
        candidate=place.candidate.name,
        rung=place.rung,
        steps=summary.steps,
        tokens=summary.tokens,
        seconds_per_step=median(seconds) if seconds else None,
        ranks=summary.ranks,
        bits_per_byte=measured.total,
        per_corpus=_totals(measured),
        blocks=blocks(measured.documents),
    )


def _totals(measured: BitsPerByte) -> dict[str, float]:
    return {name: bits.total for name, bits in measured.per_corpus.items() if bits.total is not None}


def blocks(documents: Documents) -> Blocks:
    """Documents in at most MAX_BLOCKS blocks, each of every MAX_BLOCKS-th one."""
    count = min(MAX_BLOCKS, len(documents.bits))
    return Blocks(
        bits=[float(np.sum(documents.bits[first::count])) for first in range(count)],
        bytes=[int(np.sum(documents.bytes[first::count])) for first in range(count)],
    )
