"""Data sets of the Hugging Face hub: `hf://OWNER/NAME`, or `OWNER/NAME`, each with `:SPLIT` or `:CONFIG:SPLIT` behind it.

Files of a hub repository have paths of their own, `hf://datasets/OWNER/NAME/data/*.parquet`, and are read like any other file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtoken_core.errors import InputError, in_one_line

_NAME = re.compile(
    r"(?P<scheme>hf://)?(?P<name>(?!datasets/|buckets/|spaces/|\.)[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))??(?::(?P<split>[\w.-]+))?"
)


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set of the hub."""

    uri: str
    """As the spec names it."""
    name: str
    config: str | None
    split: str

    @property
    def key(self) -> str:
        """The same for all ways to name this split."""
        return f"hf://{self.name}:{self.config or ''}:{self.split}"

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Streams (source, record) in the hub's order. Raises InputError where the hub, the data set or the split is not to be had."""
        import datasets
        from huggingface_hub.constants import HF_HUB_OFFLINE

        if not HF_HUB_OFFLINE:
            self.version()  # one request; `load_dataset` would go on trying for half a minute
        try:
            found = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
            for row, record in enumerate(found):
                yield f"{self.uri}:{row}", record
        except Exception as e:  # the library and its file systems raise two dozen kinds
            raise self._unreachable(e) from None

    def version(self) -> str:
        """The commit that the hub has now. Raises InputError."""
        import huggingface_hub

        try:
            return str(huggingface_hub.HfApi().dataset_info(self.name, timeout=20).sha)
        except Exception as e:  # no network, no such data set, no access
            raise self._unreachable(e) from None

    def _unreachable(self, error: Exception) -> InputError:
        return InputError(
            f"{self.uri}: no such file or folder, and not to be had from the hub ({type(error).__name__}: {in_one_line(error)}); "
            "where there is no hub, give files"
        )


def hub_dataset(uri: str) -> HubDataset | None:
    """The hub data set that `uri` names, None for anything else. What exists as a path is taken as a path."""
    found = _NAME.fullmatch(uri)
    if found is None or Path(uri).exists():
        return None
    if found["scheme"] is None and found["split"] is None:
        return None  # a path without a file behind it, more likely than a name
    return HubDataset(uri, found["name"], found["config"], found["split"] or "train")
