"""What each token id of a tokenizer stands for, in bytes.

Everything that compares two tokenizers (alignment, overlap, projection) works on a `TokenTable`, never on token
strings. The rule that every table keeps: the bytes of the ids that `encode` gives for a text, put together, are
`normalize(text)` in UTF-8, after one added space where the tokenizer puts one in front (`dummy_prefix`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xtoken_core.errors import InputError

ROLES = ("bos", "eos", "pad", "unk")
"""Roles of special tokens, in the order in which a projection pairs them."""

_SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for the 256 bytes (GPT-2's `bytes_to_unicode`, turned round)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_CHAR_TO_BYTE = _byte_level_alphabet()
_TO_LATIN1 = {ord(c): b for c, b in _CHAR_TO_BYTE.items()}
_TO_BYTE_LEVEL = {b: c for c, b in _CHAR_TO_BYTE.items()}


# The content hash of a byte string: sum over k of _BYTE_HASHES[byte k] * HASH_BASE**k modulo 2**64.
HASH_BASE = np.uint64(0x9E3779B97F4A7C15)
_BYTE_HASHES = np.random.default_rng(0).integers(2**64, size=256, dtype=np.uint64)
SPACE_HASH = _BYTE_HASHES[ord(" ")]
_BLOCK = 1 << 16


def _geometric(base: int, size: int) -> np.ndarray:
    powers = np.full(size, np.uint64(base))
    powers[:1] = 1
    return np.cumprod(powers)


_POWERS = _geometric(int(HASH_BASE), _BLOCK)


def hash_powers(exponents: np.ndarray) -> np.ndarray:
    """HASH_BASE**exponent modulo 2**64, uint64, for ascending exponents from zero on."""
    powers = _POWERS[exponents & (_BLOCK - 1)]
    blocks = int(exponents[-1]) // _BLOCK if len(exponents) else 0
    if blocks:
        powers *= _geometric(pow(int(HASH_BASE), _BLOCK, 2**64), blocks + 1)[exponents // _BLOCK]
    return powers


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

    @classmethod
    def from_tokenizer(cls, tok: PreTrainedTokenizerFast) -> TokenTable:
        """Reads the table off a fast tokenizer. Raises InputError for one that is neither byte-level nor SentencePiece."""
        backend = tok.backend_tokenizer
        config = _config(backend)
        byte_level, byte_fallback = _conventions(config, getattr(tok, "name_or_path", ""))
        vocab = backend.get_vocab(with_added_tokens=False)
        added = backend.get_added_tokens_decoder()
        roles = {r: int(i) for r in ROLES if (i := getattr(tok, f"{r}_token_id")) is not None}

        size = max([-1, *vocab.values(), *added]) + 1
        tokens, special, ordinary = [b""] * size, np.ones(size, dtype=bool), np.zeros(size, dtype=bool)
        for text, i in vocab.items():
            byte = _BYTE_TOKEN.fullmatch(text) if byte_fallback else None
            tokens[i] = bytes([int(byte[1], 16)]) if byte else _vocab_bytes(text, byte_level)
            special[i], ordinary[i] = False, not byte
        for i, token in added.items():
            special[i] = token.special or i in roles.values()
            if special[i]:
                tokens[i], ordinary[i] = b"", False
            elif not (byte_fallback and _BYTE_TOKEN.fullmatch(token.content)):
                tokens[i] = (token.content if byte_level else token.content.replace(_SPACE, " ")).encode()
        dummy_prefix, dummy_after_special = _dummy_prefixes(backend, [t.content for t in added.values() if t.special])
        return cls(
            tokens,
            special,
            ordinary,
            roles,
            dummy_prefix,
            dummy_after_special,
            byte_level,
            _text_normalizer(config["normalizer"]),
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
        """uint64 [V]: content hash of each id's bytes, such that the hash of a text is the sum over its tokens of
        `hashes[id] * HASH_BASE**(offset of the token)`."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        starts = ends - self.lengths
        place = np.arange(ends[-1] if len(ends) else 0) - np.repeat(starts, self.lengths)
        text = np.frombuffer(b"".join(self.tokens), dtype=np.uint8)
        sums = np.concatenate(([np.uint64(0)], np.cumsum(_BYTE_HASHES[text] * _POWERS[place])))
        return sums[ends] - sums[starts]

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
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text."""
        return frozenset(np.flatnonzero(self.special).tolist())

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
        return max([-1, *np.flatnonzero(~self.special)[-1:].tolist(), *self.roles.values()]) + 1

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of a sequence of ids put together, an added prefix space included."""
        return b"".join(self.objects[np.asarray(ids, dtype=np.int64)].tolist())

    def normalize(self, text: str) -> str:
        """The text as its tokens spell it: through the tokenizer's own normaliser, without an added prefix space.

        SentencePiece writes a space as U+2581, so a U+2581 in the text becomes a space.
        """
        if self.normalizer is not None:
            text = self.normalizer.normalize_str(text)
        return text if self.byte_level else text.replace(_SPACE, " ")


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
    if not texts:
        return []
    return tok(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


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

    Raises InputError that names the reference.
    """
    ref = tokenizer or model
    path = ref
    if "://" in ref:
        from xtoken_core.storage import local_copy

        path = str(local_copy(ref))
    try:
        if path.endswith(".gguf"):
            tok = AutoTokenizer.from_pretrained(str(Path(path).parent), gguf_file=Path(path).name)
        else:
            tok = AutoTokenizer.from_pretrained(path)
    except Exception as e:  # transformers raises a dozen kinds, from OSError to KeyError
        raise InputError(f"{ref}: cannot load a tokenizer: {str(e).strip().splitlines()[0] if str(e).strip() else e!r}") from None
    if not isinstance(tok, PreTrainedTokenizerFast):
        raise InputError(f"{ref}: has no fast tokenizer (tokenizer.json)")
    return tok


def bare_tokenizer(tok: PreTrainedTokenizerFast) -> Tokenizer:
    """A tokenizer with the same model and pre-tokenizer, but no normaliser, no prefix and no added tokens.

    It shares the model with `tok`. SentencePiece's space is the caller's to write as U+2581.
    """
    backend = tok.backend_tokenizer
    bare = Tokenizer(backend.model)
    pre = _without_prefix(_config(backend)["pre_tokenizer"])
    if pre is not None:
        donor = Tokenizer.from_str(json.dumps({**_EMPTY_TOKENIZER, "pre_tokenizer": pre}))
        bare.pre_tokenizer = donor.pre_tokenizer
    return bare


_EMPTY_TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}


def _config(backend: Tokenizer) -> dict:
    """The tokenizer's settings as in tokenizer.json; taken part by part, since the whole would write out the vocabulary."""
    parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    config = {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}
    return {**config, "byte_fallback": getattr(backend.model, "byte_fallback", False)}


def _parts(config: dict | None) -> list[dict]:
    """A normaliser, pre-tokenizer or decoder as a flat list of its steps."""
    if config is None:
        return []
    for key in ("normalizers", "pretokenizers", "decoders"):
        if config["type"] == "Sequence" and key in config:
            return [step for part in config[key] for step in _parts(part)]
    return [config]


def _conventions(config: dict, name: str) -> tuple[bool, bool]:
    """(byte-level BPE, byte fallback), read off the decoder."""
    steps = _parts(config["decoder"])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return True, False
    writes_space = any(step["type"] == "Replace" and step["pattern"].get("String") == _SPACE for step in steps)
    if "Metaspace" in kinds or writes_space:
        return False, "ByteFallback" in kinds or bool(config["byte_fallback"])
    raise InputError(f"{name or 'tokenizer'}: neither byte-level nor SentencePiece, its tokens' bytes are unknown")


def _vocab_bytes(text: str, byte_level: bool) -> bytes:
    if not byte_level:
        return text.replace(_SPACE, " ").encode()
    if all(c in _CHAR_TO_BYTE for c in text):
        return text.translate(_TO_LATIN1).encode("latin-1")
    return text.encode()  # the byte-level decoder does the same


def _dummy_prefixes(backend: Tokenizer, specials: list[str]) -> tuple[bool, bool]:
    """Whether a space appears in front of text, and of text after a special token."""

    def prefixed(special: str) -> bool:
        pieces = "".join(backend.encode(special + "x", add_special_tokens=False).tokens)
        return pieces.removeprefix(special).startswith((_SPACE, _TO_BYTE_LEVEL[ord(" ")]))

    as_text, backend.encode_special_tokens = backend.encode_special_tokens, False  # `encode` leaves it on
    found = prefixed(""), any(prefixed(special) for special in specials[:1])
    backend.encode_special_tokens = as_text
    return found


def _text_normalizer(config: dict | None) -> normalizers.Normalizer | None:
    """The steps of a normaliser that change text: all but the prefix and the writing of a space as U+2581."""
    writes_space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = [step for step in _parts(config) if step["type"] != "Prepend" and step != writes_space]
    if not steps:
        return None
    sequence = {"type": "Sequence", "normalizers": steps}
    return Tokenizer.from_str(json.dumps({**_EMPTY_TOKENIZER, "normalizer": sequence})).normalizer


def _without_prefix(config: dict | None) -> dict | None:
    if config is None:
        return None
    off = {"add_prefix_space": False, "prepend_scheme": "never"}
    steps = [{k: off.get(k, v) for k, v in step.items()} for step in _parts(config)]
    return {"type": "Sequence", "pretokenizers": steps}
