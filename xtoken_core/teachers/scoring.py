"""Scoring: a teacher runs once over prepared rows, and what it says of them is stored."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtoken_core.losses.logits import HiddenLogits
from xtoken_core.models import final_hidden, head_logits
from xtoken_core.teachers.scores import ScoreSettings, is_part, part_file, write_part

PART_ROWS = 1024
"""Rows of one file: what is lost at most when scoring is interrupted."""
_FORWARD_TOKENS = 16384
"""Of one forward pass."""
_LOGITS = 2**26
"""Numbers of logits that are there at a time."""

log = logging.getLogger(__name__)


@torch.no_grad()
def score_rows(model: Any, rows: Any, folder: Path, settings: ScoreSettings) -> int:
    """Writes what a model says of prepared rows to parts in `folder`; parts that are there already are left. The tokens scored.

    rows: map-style, with `student_ids`, in the order of the file. The model stays where it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scored = 0
    for part, first in enumerate(range(0, len(rows), PART_ROWS)):
        path = part_file(folder, part)
        if is_part(path, settings):
            continue
        started = time.monotonic()
        ids = [torch.as_tensor(rows[i]["student_ids"]).long() for i in range(first, min(first + PART_ROWS, len(rows)))]
        tensors = _score_part(model, ids, settings)
        write_part(path, tensors, settings)
        tokens = len(tensors["realised"])
        scored += tokens
        log.info("%s: %d tokens, %.0f tokens/s", path.name, tokens, tokens / (time.monotonic() - started))
    return scored


def _score_part(model: Any, ids: list[Tensor], settings: ScoreSettings) -> dict[str, Tensor]:
    """The tensors of one part; rows run by length, so that little is padded."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: dict[int, dict[str, Tensor]] = {}
    while order:
        size = max(1, _FORWARD_TOKENS // len(ids[order[-1]]))
        batch, order = order[-size:], order[:-size]
        width = len(ids[batch[-1]])
        padded = torch.stack([torch.nn.functional.pad(ids[i], (0, width - len(ids[i]))) for i in batch]).to(model.device)
        hidden = final_hidden(model, padded)
        for n, i in enumerate(batch):
            found[i] = _score_row(head_logits(model, hidden[n : n + 1, : len(ids[i])], settings.vocab_size), ids[i], settings)
    tensors = {name: torch.cat([found[i][name] for i in range(len(ids))]) for name in found[0]}
    return tensors | {"starts": torch.tensor([0, *map(len, ids)]).cumsum(0)}


def _score_row(logits: HiddenLogits, ids: Tensor, settings: ScoreSettings) -> dict[str, Tensor]:
    """The scores of one row of T tokens, on the CPU."""
    step = max(1, _LOGITS // settings.vocab_size)
    parts = []
    for first in range(0, len(ids), step):
        z = replace(logits, hidden=logits.hidden[:, first : first + step]).dense()[0].float()
        following = torch.nn.functional.pad(ids[first + 1 : first + 1 + len(z)], (0, 1))[: len(z)].to(z.device)
        top, log_sum = z.topk(settings.top_k), z.logsumexp(-1)
        realised = z.gather(1, following[:, None])[:, 0] - log_sum
        values = top.values - log_sum[:, None]
        parts.append(
            {
                "values": values if settings.dtype == "float32" else values.half(),
                "indices": top.indices.int(),
                "log_sum": log_sum,
                "log_normaliser": (z / settings.temperature).logsumexp(-1),
                "realised": realised,
            }
        )
    row = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    row["realised"][-1] = 0.0
    return row
