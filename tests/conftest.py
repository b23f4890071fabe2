"""Settings that must be in force before any test module imports anything."""

from __future__ import annotations

import os

if not os.path.exists(
    "/dev/nvidiactl"
):  # no GPU: Triton's interpreter runs the kernels' logic; read when Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
