"""What each token id of a tokenizer stands for, in bytes.

Everything that compares two tokenizers (alignment, overlap, projection) works on a `TokenTable`, never on token
strings. The rule that every table keeps: the bytes of the ids that `encode` gives for a text, put together, are
`normalize(text)` in UTF-8, after one added space where the tokenizer puts one in front (`dummy_prefix`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xtoken_core.errors import InputError
from xtoken_core.storage import local_copy, normalize
from xtoken_core.token_hashes import content_hashes
from xtoken_core.tokenizer_checks import check_merges, hide_control_pieces
from xtoken_core.tokenizer_parts import (
    BYTE_TOKEN,
    SPACE,
    backend_config,
    byte_conventions,
    dummy_prefixes,
    text_normalizer,
    turn_end,
    vocab_bytes,
)

ROLES = ("bos", "eos", "pad", "unk")
"""Roles of special tokens, in the order in which a projection pairs them."""


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The bytes of every id of a vocabulary, and what kind of token it is.

    Ids run from 0 to the largest id of the tokenizer; special tokens and unused ids stand for b"".
    """

    tokens: list[bytes]
    """Bytes of each id."""
    special: np.ndarray
    """bool [V]: special tokens and unused ids."""
    ordinary: np.ndarray
    """bool [V]: in the model's own vocabulary and no byte-fallback token; what an encoding prefers among equal bytes."""
    roles: dict[str, int]
    """Id of each role in `ROLES` that the tokenizer fills."""
    dummy_prefix: bool
    """Whether the tokenizer puts a space in front of text (Llama-2, Mistral v1 and v3); `tokens` shows it."""
    dummy_after_special: bool
    """Whether it puts one after each special token inside the text, too."""
    byte_level: bool
    """Byte-level BPE; otherwise SentencePiece conventions."""
    normalizer: normalizers.Normalizer | None = None
    """The part of the tokenizer's normaliser that changes text."""
    turn_end: int | None = None
    """The id that ends a turn in the tokenizer's chat template: often EOS, but not Gemma's."""

    @classmethod
    def from_tokenizer(cls, tok: PreTrainedTokenizerFast) -> TokenTable:
        """Reads the table off a fast tokenizer. Raises InputError for one that is neither byte-level nor SentencePiece."""
        backend = tok.backend_tokenizer
        config = backend_config(backend)
        byte_level, byte_fallback = byte_conventions(config, getattr(tok, "name_or_path", ""))
        vocab = backend.get_vocab(with_added_tokens=False)
        added = backend.get_added_tokens_decoder()
        roles = {r: int(i) for r in ROLES if (i := getattr(tok, f"{r}_token_id")) is not None}

        size = max([-1, *vocab.values(), *added]) + 1
        tokens, special, ordinary = [b""] * size, np.ones(size, dtype=bool), np.zeros(size, dtype=bool)
        for text, i in vocab.items():
            byte = BYTE_TOKEN.fullmatch(text) if byte_fallback else None
            tokens[i] = bytes([int(byte[1], 16)]) if byte else vocab_bytes(text, byte_level)
            special[i], ordinary[i] = False, not byte
        for i, token in added.items():
            is_byte = byte_fallback and BYTE_TOKEN.fullmatch(token.content) is not None  # whatever it is marked as
            special[i] = (token.special and not is_byte) or i in roles.values()
            if special[i]:
                tokens[i], ordinary[i] = b"", False
            elif not is_byte:
                tokens[i] = (token.content if byte_level else token.content.replace(SPACE, " ")).encode()
        dummy_prefix, dummy_after_special = dummy_prefixes(backend, [t.content for t in added.values() if t.special])
        return cls(
            tokens,
            special,
            ordinary,
            roles,
            dummy_prefix,
            dummy_after_special,
            byte_level,
            text_normalizer(config["normalizer"]),
            turn_end(tok, {token.content: i for i, token in added.items() if special[i]}),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> bytes:
        return self.tokens[index]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [V]: bytes of each id."""
        return np.fromiter(map(len, self.tokens), dtype=np.int32, count=len(self))

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 [V]: content hash of each id's bytes (see `content_hashes`)."""
        return content_hashes(self.tokens, self.lengths)

    @cached_property
    def starts_with_space(self) -> np.ndarray:
        """bool [V]: the id's bytes begin with a space."""
        return np.fromiter((token[:1] == b" " for token in self.tokens), dtype=bool, count=len(self))

    @cached_property
    def objects(self) -> np.ndarray:
        """object [V]: `tokens` as an array, to gather from."""
        array = np.empty(len(self), dtype=object)
        array[:] = self.tokens
        return array

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two vocabularies exactly when every id stands for the same bytes (64 bits of SHA-256, hex)."""
        return hashlib.sha256(self.lengths.astype("<i4").tobytes() + b"".join(self.tokens)).hexdigest()[:16]

    @cached_property
    def ids_by_bytes(self) -> dict[bytes, int]:
        """The id of each byte string that some token stands for; of several the ordinary one, then the lowest."""
        ids = np.flatnonzero(~self.special)
        ids = ids[np.lexsort((ids, ~self.ordinary[ids]))][::-1]
        return {self.tokens[i]: i for i in ids.tolist()}

    @cached_property
    def min_rows(self) -> int:
        """Rows that a model of this vocabulary must have: one for every id that text or a role can give.

        A special id beyond (Gemma 3: 262144, which only images use) may lack one.
        """
        ends = [] if self.turn_end is None else [self.turn_end]
        return max([-1, *np.flatnonzero(~self.special)[-1:].tolist(), *self.roles.values(), *ends]) + 1

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of a sequence of ids put together, an added prefix space included."""
        return b"".join(self.objects[np.asarray(ids, dtype=np.int64)].tolist())

    def normalize(self, text: str) -> str:
        """The text as its tokens spell it: through the tokenizer's own normaliser, without an added prefix space.

        SentencePiece writes a space as U+2581, so a U+2581 in the text becomes a space.
        """
        if self.normalizer is not None:
            text = self.normalizer.normalize_str(text)
        return text if self.byte_level else text.replace(SPACE, " ")


def role_pairs(student: TokenTable, teacher: TokenTable) -> dict[int, int]:
    """The teacher's id for each special token of the student that has one.

    It is that of the first role in `ROLES` that both fill. What ends a turn on both sides is paired before all.
    """
    ends = [(student.turn_end, teacher.turn_end), *((student.roles.get(role), teacher.roles.get(role)) for role in ROLES)]
    pairs: dict[int, int] = {}
    for own, other in ends:
        if own is not None and other is not None:
            pairs.setdefault(own, other)
    return pairs


def normalize_for(text: str, tables: Sequence[TokenTable]) -> str:
    """The text that every tokenizer leaves as it is: their normalisers applied in turn until none changes it.

    Raises InputError if there is none (one composes characters, say, and another takes them apart).
    """
    for _ in range(8):
        changed = False
        for table in tables:
            before, text = text, table.normalize(text)
            changed |= text != before
        if not changed:
            return text
    raise InputError(f"tokenizers: their normalisers undo each other on {text[:40]!r}")


def encode(tok: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without BOS or EOS; a special token's name inside the text is text."""
    backend = tok.backend_tokenizer
    backend.no_truncation()  # what an earlier call of `tok` may have left
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def row_bos(tok: PreTrainedTokenizerFast) -> int | None:
    """The id that a row of this tokenizer begins with, or None.

    BOS where the tokenizer's own template adds it, and for Gemma, which falls apart without it.
    """
    bos = tok.bos_token_id
    if bos is None:
        return None
    return bos if tok.bos_token == "<bos>" or tok("x")["input_ids"][:1] == [bos] else None


def load_tokenizer(model: str, tokenizer: str | None = None) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a model: hub id, local folder, fsspec URI or .gguf file; `tokenizer` overrides where it lies.

    Padding and truncation that were saved with it are switched off, and names of its control tokens are text where a text
    has them. Raises InputError that names the reference, also for a tokenizer that has lost its merges or scores.
    """
    ref = tokenizer or model
    path = str(local_copy(ref)) if "://" in ref else normalize(ref)
    try:
        if path.endswith(".gguf"):
            tok = AutoTokenizer.from_pretrained(str(Path(path).parent), gguf_file=Path(path).name, trust_remote_code=False)
        else:
            tok = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not isinstance(tok, PreTrainedTokenizerFast):
            raise InputError(f"{ref}: has no fast tokenizer (tokenizer.json)")
        tok.backend_tokenizer.no_padding()
        tok.backend_tokenizer.no_truncation()
        hide_control_pieces(tok.backend_tokenizer, ref)
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a dozen kinds, from OSError to Exception itself, and panics of tokenizers, which are none
        raise InputError(f"{ref}: cannot load a tokenizer: {str(e).strip().splitlines()[0] if str(e).strip() else e!r}") from None
    check_merges(tok, ref)
    return tok
