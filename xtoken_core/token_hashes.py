"""Content hashes of byte strings that add up over the tokens of a text: how alignment compares texts without spelling them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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


def content_hashes(tokens: Sequence[bytes], lengths: np.ndarray) -> np.ndarray:
    """uint64 [V]: the hash of each token's bytes, such that the hash of a text is the sum over its tokens of
    `hash * HASH_BASE**(offset of the token)`. lengths: int [V], bytes of each token."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    place = np.arange(ends[-1] if len(ends) else 0) - np.repeat(starts, lengths)
    text = np.frombuffer(b"".join(tokens), dtype=np.uint8)
    sums = np.concatenate(([np.uint64(0)], np.cumsum(_BYTE_HASHES[text] * _POWERS[place])))
    hashes: np.ndarray = sums[ends] - sums[starts]
    return hashes
