"""Scoring: a teacher runs once over prepared rows, and what it says of them is stored."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xtoken_core.costs import FORWARD_TOKENS, SCORED_LOGITS
from xtoken_core.data.rows import Row
from xtoken_core.errors import NonFiniteError
from xtoken_core.losses.cell_scores import CellCut
from xtoken_core.losses.logits import HiddenLogits
from xtoken_core.losses.scores import BITS, teacher_scores
from xtoken_core.losses.selection import next_token_ids
from xtoken_core.models import final_hidden, head_logits
from xtoken_core.teachers.scores import ScoreSettings, is_part, part_file, write_part

PART_ROWS = 1024
"""Rows of one file: what is lost at most when scoring is interrupted."""

log = logging.getLogger(__name__)


Cut = Callable[[HiddenLogits, Tensor], dict[str, Tensor]]
"""From logits [R, L, V] and the tokens [R, L] of the same rows to what is stored of them, [R, L, ...] by name."""


@torch.no_grad()
def score_rows(model: Any, rows: Sequence[Tensor], folder: Path, settings: ScoreSettings, cut: Cut) -> int:
    """Writes what a model says of rows of its tokens to parts in `folder`; parts that are there whole are left. The tokens scored.

    rows: in their order, int64 [T] each, without tokens where they are not to be scored; read when they are scored. The model stays where it is.
    Raises NonFiniteError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scored = 0
    for part, first in enumerate(range(0, len(rows), PART_ROWS)):
        path = part_file(folder, part)
        if is_part(path, settings):
            continue
        started = time.monotonic()
        tensors = _score_part(model, [rows[i] for i in range(first, min(first + PART_ROWS, len(rows)))], settings, cut)
        _check_finite(tensors, first)
        write_part(path, tensors, settings, first)
        tokens = len(tensors["realised"])
        scored += tokens
        log.info("%s: %d tokens, %.0f tokens/s", path.name, tokens, tokens / (time.monotonic() - started))
    return scored


def _check_finite(tensors: dict[str, Tensor], first: int) -> None:
    """Raises NonFiniteError for a part in which a mass is no number; a log of nothing is one."""
    bad = ~(tensors["values"] < math.inf).all(1)  # true of NaN too
    if bad.any():
        row = torch.searchsorted(tensors["starts"], bad.int().argmax(), right=True) - 1
        raise NonFiniteError(f"its outputs for row {first + int(row)} are not finite")


def _score_part(model: Any, ids: list[Tensor], settings: ScoreSettings, cut: Cut) -> dict[str, Tensor]:
    """The tensors of one part; rows run by length, so that little is padded."""
    order = sorted((i for i in range(len(ids)) if len(ids[i])), key=lambda i: len(ids[i]))
    found: dict[int, dict[str, Tensor]] = {}
    while order:
        size = max(1, FORWARD_TOKENS // len(ids[order[-1]]))
        batch, order = order[-size:], order[:-size]
        padded = pad_sequence([ids[i] for i in batch], batch_first=True).to(model.device)
        scores = cut(head_logits(model, final_hidden(model, padded), settings.vocab_size), padded)
        scores["values"] = scores["values"] if settings.dtype == "float32" else scores["values"].half()
        scores = {name: tensor.cpu() for name, tensor in scores.items()}
        for n, i in enumerate(batch):
            found[i] = {name: tensor[n, : len(ids[i])] for name, tensor in scores.items()}
    tensors = {name: torch.cat([_nothing(name, settings), *(found[i][name] for i in sorted(found))]) for name in settings.tensors}
    return tensors | {"starts": torch.tensor([0, *map(len, ids)]).cumsum(0)}


@torch.no_grad()
def measure_rows(model: Any, rows: Iterable[Row], column: str, vocab_size: int) -> dict[str, tuple[float, float]]:
    """By domain the nats that a model needs for prepared rows' targets that stand for text, and their bytes. column: prefix of what it reads of a row."""
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        ids, mask, sizes = (
            torch.as_tensor(row[f"{column}_{name}"]).long()[None].to(model.device) for name in ("ids", "mask", "bytes")
        )
        logits, counted = head_logits(model, final_hidden(model, ids), vocab_size), torch.ones(1, device=ids.device)
        nats, size = teacher_scores(logits, ids, mask * (sizes > 0), counted, BITS, sizes).tolist()
        before = found.get(row["domain"], (0.0, 0.0))
        found[row["domain"]] = (before[0] + nats, before[1] + size)
    return found


def _nothing(name: str, settings: ScoreSettings) -> Tensor:
    """What is stored of no tokens."""
    if name == "indices":
        return torch.zeros(0, settings.top_k, dtype=torch.int32)
    if name == "values":
        return torch.zeros(0, settings.top_k, dtype=torch.float32 if settings.dtype == "float32" else torch.float16)
    return torch.zeros(0)


def likeliest_tokens(k: int, temperature: float) -> Cut:
    """The cut of a teacher that has the student's vocabulary."""

    def cut(logits: HiddenLogits, ids: Tensor) -> dict[str, Tensor]:
        step = max(1, SCORED_LOGITS // logits.shape[2])
        hidden, following = logits.hidden.flatten(0, 1), next_token_ids(ids).flatten()
        parts = []
        for first in range(0, len(hidden), step):
            z = replace(logits, hidden=hidden[None, first : first + step]).dense()[0].float()
            top, log_sum = z.topk(k), z.logsumexp(-1)
            realised = z.gather(1, following[first : first + step, None])[:, 0] - log_sum
            parts.append((top.values - log_sum[:, None], top.indices.int(), realised, log_sum, (z / temperature).logsumexp(-1)))
        names = ("values", "indices", "realised", "log_sum", "log_normaliser")
        return {name: torch.cat(column).unflatten(0, ids.shape) for name, column in zip(names, zip(*parts))}

    return cut


def likeliest_cells(cut_to: CellCut) -> Cut:
    """The cut of any other teacher."""

    def cut(logits: HiddenLogits, ids: Tensor) -> dict[str, Tensor]:
        scores = cut_to(logits, ids)
        told = {"values": scores.values, "indices": scores.indices, "own": scores.values[..., 0]}
        return told | {"rest": scores.rest, "total": scores.total, "realised": scores.realised}

    return cut
