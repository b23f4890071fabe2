"""The licence that a model comes under, as its card says."""

from __future__ import annotations

import re
from pathlib import Path

from xtoken_core import storage

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.S)
_LICENCE = re.compile(r"^license(_name)?:\s*[\"']?([\w.+-]+)", re.M)


def licence_of(ref: str) -> str | None:
    """What the card of a model (README.md in its folder, or on the hub) names as its licence; None where it names none.

    `license_name` says more than the `other` that stands beside it.
    """
    card = _card(ref)
    front = _FRONT_MATTER.match(card)
    named = {bool(found[1]): found[2] for found in _LICENCE.finditer(front[1])} if front else {}
    return named.get(True) or named.get(False)


def _card(ref: str) -> str:
    if storage.is_remote(ref):
        return ""
    place = Path(storage.normalize(ref))
    folder = place.parent if place.is_file() else place
    if folder.is_dir():
        card = folder / "README.md"
        return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(ref, "README.md", etag_timeout=20)).read_text(
            encoding="utf-8", errors="replace"
        )
    except Exception:  # no hub, no card: the model itself was found by other means
        return ""
