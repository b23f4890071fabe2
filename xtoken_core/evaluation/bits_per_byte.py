"""Bits per byte of text under a model: cross-entropy that compares across tokenizers, since bytes are everyone's.

Rules that make models comparable on the same bytes:

- Each token of a text is predicted once, so each byte is counted once, whatever the window.
- The first token is predicted too. Its context is the tokenizer's BOS where rows of it begin with one, else EOS, which
  is what stands between documents in training (else BOS; without either the token costs log2 of the vocabulary's size).
- The divisor is the bytes of the text as it was given, not as a normaliser left it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from xtoken_core.models import final_hidden, head_logits
from xtoken_core.progress import bar
from xtoken_core.tokenization import row_bos

LOGIT_ROWS = 256
"""Rows of logits formed at a time: with 262144 ids 256 MiB in float32."""


@dataclass(frozen=True)
class Window:
    """Tokens [start, end) of a text, predicted together from the token before them; those from `scored` on count."""

    text: int
    start: int
    scored: int
    end: int


def windows(lengths: Sequence[int], window: int, stride: int) -> Iterator[Window]:
    """Windows of at most `window` tokens that score every token once, with at least `window - stride` tokens of context
    (all there are near the beginning)."""
    for text, length in enumerate(lengths):
        scored = 0
        while scored < length:
            end = min(window if scored == 0 else scored + stride, length)
            yield Window(text, max(0, end - window), scored, end)
            scored = end


@torch.no_grad()
def token_nats(
    model: PreTrainedModel,
    texts: Sequence[np.ndarray],
    opener: int | None,
    bos: int | None,
    window: int,
    stride: int,
    batch_tokens: int = 4096,
) -> list[np.ndarray]:
    """Cross-entropy of every token of every text (ids, without BOS), in nats: float64 [T] each.

    opener: context of a text's first token; None: that token costs as much as under a uniform distribution. bos: opens the
    later windows as well; None: the token before the window does. window, stride: in tokens.
    """
    nats = [np.zeros(len(ids)) for ids in texts]
    todo = sorted(windows([len(ids) for ids in texts], window, stride), key=lambda w: w.start - w.end)
    for batch in _progress(_by_size(todo, batch_tokens), sum(w.end - w.scored for w in todo)):
        inputs = np.zeros((len(batch), batch[0].end - batch[0].start), np.int64)
        targets = np.full(inputs.shape, -1)
        for row, w in enumerate(batch):
            ids, size = texts[w.text], w.end - w.start
            first = opener if w.start == 0 else ids[w.start - 1] if bos is None else bos
            inputs[row, 0] = 0 if first is None else first
            inputs[row, 1:size] = ids[w.start : w.end - 1]
            targets[row, w.scored - w.start : size] = ids[w.scored : w.end]
        costs = next_token_nats(model, torch.from_numpy(inputs), torch.from_numpy(targets))
        for w, cost in zip(batch, np.split(costs, np.cumsum([w.end - w.scored for w in batch])[:-1])):
            nats[w.text][w.scored : w.end] = cost
    if opener is None:
        for cost in nats:
            cost[:1] = math.log(model.config.get_text_config().vocab_size)
    return nats


def next_token_nats(model: PreTrainedModel, inputs: Tensor, targets: Tensor) -> np.ndarray:
    """Cross-entropy (float64 [N]) of the N targets [B, T] that are not negative, each predicted at its position of `inputs`."""
    hidden = final_hidden(model, inputs.to(model.device))
    rows, wanted = hidden[targets.to(model.device) >= 0], targets[targets >= 0].to(model.device)
    size = model.get_output_embeddings().weight.shape[0]
    costs = []
    for part, target in zip(rows.split(LOGIT_ROWS), wanted.split(LOGIT_ROWS)):
        logits = head_logits(model, part[None].float(), size).dense()[0]  # float32 also under a bfloat16 body
        costs.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    return torch.cat(costs).double().cpu().numpy()


def _by_size(todo: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Windows, longest first, in batches of about so many tokens, padding included."""
    at = 0
    while at < len(todo):
        count = max(1, batch_tokens // (todo[at].end - todo[at].start))
        yield list(todo[at : at + count])
        at += count


def _progress(batches: Iterator[list[Window]], total: int) -> Iterator[list[Window]]:
    with bar("bits per byte", total=total, unit=" tokens", unit_scale=True) as shown:
        for batch in batches:
            yield batch
            shown.update(sum(w.end - w.scored for w in batch))


def opener_of(tok: PreTrainedTokenizerFast) -> int | None:
    """The id that stands before a text's first token: see the module."""
    ids = (row_bos(tok), tok.eos_token_id, tok.bos_token_id)
    return next((i for i in ids if i is not None), None)
