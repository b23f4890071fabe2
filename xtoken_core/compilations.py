"""Where compiled code is kept from one run to the next."""

from __future__ import annotations

import os

from xtoken_core.storage import cache_folder


def keep_compilations() -> None:
    """Lets this process and those it starts keep what PyTorch and Triton compile beside the downloads.

    Both would by themselves keep it in a folder for temporary files, which a pod loses. Their own variables come first.
    """
    folder = cache_folder() / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
