"""What a tokenizer is put through when it is loaded, so that nothing is built on one that is broken."""

from __future__ import annotations

import contextlib
import json

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from xtoken_core.errors import InputError
from xtoken_core.tokenizer_parts import (
    BYTE_TOKEN,
    SPACE,
    backend_config,
    bare_tokenizer,
    byte_conventions,
    plain_encoding,
    vocab_bytes,
)

SAMPLED_ENTRIES = 512
"""Entries of a vocabulary that `check_merges` encodes."""

REACHABLE_SHARE = 0.75
"""Least share of them that must come out as themselves: sound vocabularies reach 97 %, those without merges none."""

_FEW_ENTRIES = 16


def check_merges(tok: PreTrainedTokenizerFast, ref: str) -> None:
    """Raises InputError, with `ref`, for a tokenizer whose vocabulary its merges or scores no longer reach.

    Conversions can lose them: the long tokens are still there, and every text comes out as single characters.
    """
    backend = tok.backend_tokenizer
    byte_level, _ = byte_conventions(backend_config(backend), ref)
    special, size = backend.get_added_tokens_decoder(), backend.get_vocab_size(with_added_tokens=False)
    texts = []
    for index in range(0, size, max(1, size // SAMPLED_ENTRIES)):  # a vocabulary of 262,144 takes a second to be written out
        piece = backend.id_to_token(index)
        if piece is None or len(piece) < 2 or index in special or BYTE_TOKEN.fullmatch(piece):
            continue
        with contextlib.suppress(UnicodeDecodeError):  # part of a character, which no text is by itself
            texts.append((vocab_bytes(piece, byte_level).decode(), index))
    if len(texts) < _FEW_ENTRIES:
        return
    written = [text if byte_level else text.replace(" ", SPACE) for text, _ in texts]
    encoded = bare_tokenizer(tok).encode_batch(written, add_special_tokens=False)
    share = sum(found.ids == [index] for found, (_, index) in zip(encoded, texts)) / len(texts)
    if share < REACHABLE_SHARE:
        raise InputError(
            f"{ref}: this tokenizer has lost its merges or scores: of {len(texts)} entries of its vocabulary, {share:.0%} "
            "encode to themselves; no model was trained with it"
        )


def hide_control_pieces(backend: Tokenizer, ref: str) -> None:
    """Keeps the tokenizer from finding its control tokens in texts that hold their names.

    Unigram models, and BPE models with merges that spell a control token, would take such a name for the token itself even
    where special tokens are off. Raises InputError, with `ref`, where that cannot be mended.
    """
    controls = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    if not _found_in_text(backend, controls):
        return
    state = json.loads(backend.model.__getstate__())
    if state["type"] == "Unigram":
        scores = [score for _, score in state["vocab"]]
        least = min(scores) - 100.0 * (1 + max(map(abs, scores)))  # worse than any other way to spell it
        vocab = [(piece, least if piece in controls else score) for piece, score in state["vocab"]]
        backend.model = models.Unigram(vocab, state["unk_id"], state.get("byte_fallback", False))
    elif state["type"] == "BPE":
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in state["merges"])
        kept = [(left, right) for left, right in pairs if left + right not in controls]
        options = ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
        backend.model = models.BPE(state["vocab"], kept, **{name: state[name] for name in options if state[name] is not None})
    if found := _found_in_text(backend, controls):
        raise InputError(f"{ref}: this tokenizer takes the text {found[0]!r} for its control token")


def _found_in_text(backend: Tokenizer, controls: dict[str, int]) -> list[str]:
    """The names of control tokens that encode to the token although special tokens are off.

    One that stands for a part of the name only, as UNK does for a bracket that the vocabulary lacks, is not meant by it.
    """
    names = list(controls)
    with plain_encoding(backend, specials_as_text=True):
        encoded = backend.encode_batch([f"a{name}a" for name in names], add_special_tokens=False)
    meant = [(controls[name], (1, 1 + len(name))) for name in names]
    return [name for name, whole, found in zip(names, meant, encoded) if whole in zip(found.ids, found.offsets)]
