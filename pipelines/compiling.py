"""Specs compiled to KFP's YAML, and the committed forms kept fresh."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from pipelines.dag import build_pipeline, build_sweep
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec

ROOT = Path(__file__).parent
SPECS, COMPILED = ROOT / "specs", ROOT / "compiled"


LARGEST_SPEC = 40_000
"""Characters of a spec as JSON. KFP gives a step all its inputs as one argument, of which Linux takes 128 KiB; the report is also
told every corpus of the spec with its version."""


def compile_spec(spec: DistillationSpec) -> str:
    """The compiled pipeline as YAML: the same text for the same spec. Raises InputError for a spec that no step could be given."""
    if (size := len(spec.to_json())) > LARGEST_SPEC:
        raise InputError(
            f"spec: {size:,} characters as JSON; a step can be given {LARGEST_SPEC:,}: name files by wildcards, as s3://bucket/*.parquet"
        )
    return _compiled(partial(build_pipeline, spec))


def compile_sweep(variants: Mapping[str, DistillationSpec]) -> str:
    """The compiled pipeline of a sweep (see `pipelines.sweeps`) as YAML."""
    return _compiled(partial(build_sweep, variants))


def _compiled(build: Callable[[], Any]) -> str:
    """Compiles in a thread, whose call stack is short.

    KFP reads the source of every caller whenever a task is set up: some hundred times in all, a second where callers are many.
    """
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as thread:
        path = Path(scratch) / "pipeline.yaml"
        thread.submit(lambda: compiler.Compiler().compile(build(), str(path))).result()
        return path.read_text(encoding="utf-8")


def documents(compiled: str) -> list[dict[str, Any]]:
    """The documents of a compiled pipeline (the pipeline, and its Kubernetes settings), without the version of the SDK."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, some ten times as fast
    parsed = list(yaml.load_all(compiled, Loader=loader))
    for document in parsed:
        document.pop("sdkVersion", None)
    return parsed


def stale() -> list[Path]:
    """The specs of this repository whose committed compiled form is missing or says something else."""
    pairs = [(spec, COMPILED / spec.name) for spec in sorted(SPECS.glob("*.yaml"))]
    return [spec for spec, compiled in pairs if not compiled.exists() or not _same(spec, compiled.read_text(encoding="utf-8"))]


def compile_all() -> list[Path]:
    """Compiles the stale ones anew; returns what was written."""
    written = []
    for spec in stale():
        target = COMPILED / spec.name
        target.write_text(compile_spec(DistillationSpec.from_yaml(spec)), encoding="utf-8")
        written.append(target)
    return written


def _same(spec: Path, compiled: str) -> bool:
    return documents(compile_spec(DistillationSpec.from_yaml(spec))) == documents(compiled)
