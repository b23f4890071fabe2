"""What a fast tokenizer is made of: its conventions for bytes and spaces, its normaliser, its parts by themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from xtoken_core.bounded import Bounded, Overrun, Refused
from xtoken_core.errors import InputError

SPACE = "\u2581"
"""How SentencePiece writes a space."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""Names of SentencePiece's byte tokens."""


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for the 256 bytes (GPT-2's `bytes_to_unicode`, turned round)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_CHAR_TO_BYTE = _byte_level_alphabet()
_TO_LATIN1 = {ord(c): b for c, b in _CHAR_TO_BYTE.items()}
_TO_BYTE_LEVEL = {b: c for c, b in _CHAR_TO_BYTE.items()}


def bare_tokenizer(tok: PreTrainedTokenizerFast) -> Tokenizer:
    """A tokenizer with the same model and pre-tokenizer, but no normaliser, no prefix and no added tokens.

    It shares the model with `tok`. SentencePiece's space is the caller's to write as U+2581.
    """
    backend = tok.backend_tokenizer
    bare = Tokenizer(backend.model)
    pre = _without_prefix(backend_config(backend)["pre_tokenizer"])
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


def backend_config(backend: Tokenizer) -> dict:
    """The tokenizer's settings as in tokenizer.json; taken part by part, since the whole would write out the vocabulary."""
    parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    config = {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}
    traits = {
        name: getattr(backend.model, name, None) for name in ("byte_fallback", "end_of_word_suffix", "continuing_subword_prefix")
    }
    return {**config, **traits}


def _parts(config: dict | None) -> list[dict]:
    """A normaliser, pre-tokenizer or decoder as a flat list of its steps."""
    if config is None:
        return []
    for key in ("normalizers", "pretokenizers", "decoders"):
        if config["type"] == "Sequence" and key in config:
            return [step for part in config[key] for step in _parts(part)]
    return [config]


def byte_conventions(config: dict, name: str) -> tuple[bool, bool]:
    """(byte-level BPE, byte fallback), read off the decoder.

    Raises InputError for a tokenizer of another kind, and for one that marks in its tokens where words end or go on: CLIP's
    `</w>` is not text.
    """
    for mark in ("end_of_word_suffix", "continuing_subword_prefix"):
        if config[mark]:
            raise InputError(
                f"{name or 'tokenizer'}: its tokens carry the {mark} {config[mark]!r}, which is not text: not supported"
            )
    steps = _parts(config["decoder"])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return True, False
    writes_space = any(step["type"] == "Replace" and step["pattern"].get("String") == SPACE for step in steps)
    if "Metaspace" in kinds or writes_space:
        return False, "ByteFallback" in kinds or bool(config["byte_fallback"])
    raise InputError(f"{name or 'tokenizer'}: neither byte-level nor SentencePiece, its tokens' bytes are unknown")


def vocab_bytes(text: str, byte_level: bool) -> bytes:
    """The bytes that an entry of the vocabulary stands for."""
    if not byte_level:
        return text.replace(SPACE, " ").encode()
    if all(c in _CHAR_TO_BYTE for c in text):
        return text.translate(_TO_LATIN1).encode("latin-1")
    return text.encode()  # the byte-level decoder does the same


def dummy_prefixes(backend: Tokenizer, specials: list[str]) -> tuple[bool, bool]:
    """Whether a space appears in front of text, and of text after a special token."""

    def prefixed(special: str) -> bool:
        pieces = "".join(backend.encode(special + "x", add_special_tokens=False).tokens)
        return pieces.removeprefix(special).startswith((SPACE, _TO_BYTE_LEVEL[ord(" ")]))

    with plain_encoding(backend, specials_as_text=False):  # `encode` leaves it on
        return prefixed(""), any(prefixed(special) for special in specials[:1])


@contextmanager
def plain_encoding(backend: Tokenizer, specials_as_text: bool) -> Iterator[None]:
    """Encodes without padding and truncation in the block, with names of special tokens as text or not; then as before."""
    before, padding, truncation = backend.encode_special_tokens, backend.padding, backend.truncation
    backend.encode_special_tokens = specials_as_text
    backend.no_padding()
    backend.no_truncation()
    try:
        yield
    finally:
        backend.encode_special_tokens = before
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


def rendered(tok: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: Any = None, generation: bool = False) -> str:
    """What a tokenizer's `apply_chat_template` gives; `generation`: with the prompt for an answer. Raises Refused, and Overrun of those."""
    render = Bounded(tok.apply_chat_template)
    try:
        return str(render(messages, tools=tools, tokenize=False, add_generation_prompt=generation))
    finally:
        render.close()


def turn_end(tok: PreTrainedTokenizerFast, specials: dict[str, int]) -> int | None:
    """The id of the special token that the chat template puts behind what an assistant says last; None without one."""
    answer = "\ufdd0"  # a noncharacter, which no template has
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    if not tok.chat_template:
        return None
    try:
        _, said, behind = rendered(tok, chat).rpartition(answer)
    except Overrun as e:
        raise InputError(f"{tok.name_or_path}: its chat template: {e}") from None
    except Refused:  # several templates, or one that wants other messages
        return None
    if not said:
        return None
    names = [name for name in specials if name and behind.lstrip().startswith(name)]
    return specials[max(names, key=len)] if names else None


def text_normalizer(config: dict | None) -> normalizers.Normalizer | None:
    """The steps of a normaliser that change text: all but the prefix and the writing of a space as U+2581."""
    writes_space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
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
