"""Whether two tokenizers share a vocabulary: every id that stands for text stands for the same text on both sides."""

from __future__ import annotations

import itertools

import numpy as np
from transformers import PreTrainedTokenizerFast

from xtoken_core.errors import InputError
from xtoken_core.tokenization import TokenTable, encode

_SHOWN = 3
"""Ids that a refusal names."""
_TRIED = 4096
"""Ids of one side only that are tried; a family differs in fewer."""


def check_same_vocabulary(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, who: str) -> None:
    """Raises InputError, which names the first ids that differ, unless a teacher has the student's vocabulary.

    An id that only one side has, or that is special on the other, counts only if that side's encoding can give it: special
    tokens, unused ids and padding of the vocabulary stand for no text. `who` names the teacher.
    """
    tables = TokenTable.from_tokenizer(student), TokenTable.from_tokenizer(teacher)
    if tables[0].fingerprint == tables[1].fingerprint:
        return
    size = max(map(len, tables))
    text = [np.pad(~table.special, (0, size - len(table))) for table in tables]
    told = [np.append(table.objects, np.full(size - len(table), b"", object)) for table in tables]
    parting = set(np.flatnonzero(text[0] & text[1] & (told[0] != told[1])).tolist())
    parting.update(_reached(student, told[0], np.flatnonzero(text[0] & ~text[1])))
    parting.update(_reached(teacher, told[1], np.flatnonzero(text[1] & ~text[0])))
    if not parting:
        return
    first = ", ".join(
        f"{i} ({_shown(told[0][i])} against {_shown(told[1][i])})" for i in itertools.islice(sorted(parting), _SHOWN)
    )
    more = f" and {len(parting) - _SHOWN} more" if len(parting) > _SHOWN else ""
    raise InputError(
        f"{who}: no projection, so it must have the student's vocabulary, but ids differ (student against teacher): "
        f"{first}{more}; add `projection: {{}}`"
    )


def _reached(tok: PreTrainedTokenizerFast, told: np.ndarray, ids: np.ndarray) -> list[int]:
    """Those of `ids` that an encoding of their own text gives; all of them where they are too many for a family."""
    if len(ids) > _TRIED:
        return ids.tolist()
    texts = [told[i].decode(errors="replace") for i in ids.tolist()]
    return [i for i, found in zip(ids.tolist(), encode(tok, texts), strict=True) if i in found]


def _shown(text: bytes) -> str:
    return repr(text.decode(errors="replace")) if text else "no text"
