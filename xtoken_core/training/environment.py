"""What a run ran on: versions, commit and hardware, for its report."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from xtoken_core.results.training import Environment

LIBRARIES = ("xtoken-pipelines", "torch", "transformers", "tokenizers", "datasets", "kfp", "triton", "lm-eval")


def describe_environment() -> Environment:
    """Versions, commit and hardware of this process."""
    import torch

    return Environment(
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        versions=_versions(),
        commit=commit(),
        cpu=_cpu_name(),
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        devices=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    )


def commit() -> str | None:
    """Commit of the code: of the checkout it lies in, or of the image's build (environment variable XTOKEN_COMMIT)."""
    here = Path(__file__)
    try:
        # a checkout around the environment, of other code, does not track this file
        tracked = ["git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name]
        subprocess.run(tracked, capture_output=True, timeout=10, check=True)
        describe = ["git", "-C", str(here.parent), "describe", "--always", "--dirty=+"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("XTOKEN_COMMIT")


def _versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
