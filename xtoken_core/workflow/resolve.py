"""What the steps of a run share: the part of the spec each one reads, cache keys that follow content, one-line errors.

The first step, `resolve`, gives every other step its own *view* of the spec: what that step reads, the rest reset, and a
digest of the files it reads and of this library's code as a YAML comment. A workflow engine that keys its cache on a
step's inputs then runs a step again exactly when something it depends on has changed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from xtoken_core import storage
from xtoken_core.errors import InputError
from xtoken_core.spec import MAX_TEACHERS, DistillationSpec, StudentSpec, TeacherSpec
from xtoken_core.training.trackers import check_trackers

ERROR_FILE = "XTOKEN_ERROR_FILE"
"""Environment variable: where a step that stops for bad input leaves its line, for the program that started it."""

CHECKPOINTS = "XTOKEN_CHECKPOINTS"
"""Environment variable: where a local run keeps the checkpoints from which an interrupted training resumes."""

_TOKENIZERS = {"student": ("model", "tokenizer"), "teachers": ("id", "model", "tokenizer", "projection")}
_TEXTS = ("validation", "format", "text_key", "messages_key", "assistant_only", "max_length")
_DIVERGENCE = (
    "mode",
    "chunk_distribution",
    "topk_scope",
    "vocab_topk",
    "uncommon_topk",
    "temperature",
    "reverse_kl",
    "exact_match_only",
)
_MEASURES = ("bits_per_byte", "texts", "window", "tasks", "num_fewshot", "limit")

READS: dict[str, dict[str, tuple[str, ...]]] = {
    "overlap": {**_TOKENIZERS, "teachers": (*_TOKENIZERS["teachers"], "mode"), "loss": ("mode",)},
    "projection": _TOKENIZERS,
    "prepare": {**_TOKENIZERS, "data": ("*",)},
    "distill": {
        "student": ("*",),
        "teachers": ("*",),
        "loss": ("*",),
        "data": ("*",),
        "training": ("*",),
        "resources": ("nodes", "gpus_per_node"),
    },
    "baseline": {**_TOKENIZERS, "student": ("*",), "data": ("*",), "training": ("*",), "resources": ("gpus_per_node",)},
    "evaluate_student": {
        **_TOKENIZERS,
        "student": ("*",),
        "loss": _DIVERGENCE,
        "data": _TEXTS,
        "evaluation": _MEASURES,
        "training": ("attention",),
    },
    "evaluate_teacher": {**_TOKENIZERS, "data": _TEXTS, "evaluation": _MEASURES, "training": ("attention",)},
    "report": {"*": ("*",)},
}
"""Fields of the spec that each kind of step reads; `*`: all."""


def shape(spec: DistillationSpec) -> dict[str, Any]:
    """What of the spec is built into a compiled pipeline: its tasks, their wiring and what they get on a cluster."""
    fixed = {
        "teachers": [t.id for t in spec.teachers],
        **{f"teachers.{t.id}.projection": "a projection" if t.cross_tokenizer else "none" for t in spec.teachers},
        "data.shards": spec.data.shards,
        "evaluation.ce_baseline": spec.evaluation.ce_baseline,
        "evaluation": evaluated(spec),
    }
    return fixed | {f"resources.{name}": value for name, value in spec.resources.model_dump(mode="json").items()}


def evaluated(spec: DistillationSpec) -> list[str]:
    """Who is measured: student_before, student_after_best, student_after_last, baseline_..., teacher-<id>; none without a measure."""
    measure = spec.evaluation
    if not (measure.tasks or spec.measures_bits):
        return []
    checkpoints = ("best", "last") if spec.data.validation else ("last",)
    return [
        "student_before",
        *(f"student_after_{checkpoint}" for checkpoint in checkpoints),
        *(f"baseline_{checkpoint}" for checkpoint in checkpoints if measure.ce_baseline),
        *(f"teacher-{teacher.id}" for teacher in spec.teachers),
    ]


def resolve(spec_text: str, overrides: str = "", compiled: str = "") -> dict[str, Any]:
    """Checks a spec with its overrides, and returns the view of every step.

    `overrides` holds `dotted.key=value` items separated by blanks, quoted as in a shell. `compiled`, where given, is the
    `shape` of the spec that was compiled, as JSON. Keys: overlap, prepare, distill, baseline, evaluate_student, report,
    projection_<i> and evaluate_teacher_<i> for each teacher slot i (empty where there is no such teacher), checkpoints
    (a folder or URI for those of this run), inputs (list of every model and corpus: `field`, `uri`, `version`).

    Raises InputError for a bad spec or override, for an override that the compiled pipeline cannot follow, for rows that do
    not divide over a cluster's GPUs, for models and data that are not there, and for an output that cannot be written or would
    take the place of something that is no run.
    """
    spec = DistillationSpec.from_text(spec_text, _split(overrides))
    built_in = json.loads(compiled) if compiled else shape(spec)
    for name, asked in shape(spec).items():
        if built_in.get(name) != asked:
            told = json.dumps(asked, ensure_ascii=False)
            raise InputError(
                f"{name}: {told} contradicts the compiled pipeline, which has {json.dumps(built_in.get(name))} built in"
            )
    if CHECKPOINTS not in os.environ:  # a local run has this machine's GPUs, whatever `resources` says
        check_ranks(spec)
    storage.check_writable(spec.output.uri)
    storage.check_replaceable(spec.output.uri)
    check_trackers(spec.training.report_to)
    if spec.evaluation.tasks:
        from xtoken_core.evaluation.harness import plan_tasks

        plan_tasks(spec.evaluation.tasks)  # a misspelt task shows now, and not after the training
    versions, student = _Versions(), spec.student
    models: tuple[StudentSpec | TeacherSpec, ...] = (student, *spec.teachers)
    train, held_out = _named("data.train", spec.data.train), _named("data.validation", spec.data.validation)
    folders = _named("evaluation.tasks", [task for task in spec.evaluation.tasks if "/" in task])
    texts = [*(_named("evaluation.texts", spec.evaluation.texts) or held_out), *folders]
    views: dict[str, Any] = {
        "overlap": view(spec, "overlap", versions.of(models)),
        "prepare": view(spec, "prepare", versions.of(models, [*train, *held_out])),
        "distill": view(spec, "distill", versions.of(models)),
        "baseline": view(spec, "baseline", versions.of([student])),
        "evaluate_student": view(spec, "evaluate_student", versions.of(models, texts)),
        "report": view(spec, "report"),
        **{f"{step}_{i}": "" for step in ("projection", "evaluate_teacher") for i in range(MAX_TEACHERS)},
    }
    for i, teacher in enumerate(spec.teachers):
        views[f"evaluate_teacher_{i}"] = view(spec, "evaluate_teacher", versions.of([teacher], texts), i)
        if teacher.cross_tokenizer:
            views[f"projection_{i}"] = view(spec, "projection", versions.of([student, teacher]), i)
    return views | {"checkpoints": _checkpoints(spec), "inputs": versions.known}


def check_ranks(spec: DistillationSpec) -> None:
    """Raises InputError unless the rows of a step divide over the GPUs that training gets on a cluster."""
    spec.training.accumulation(spec.resources.nodes * max(spec.resources.gpus_per_node, 1))


def view(spec: DistillationSpec, step: str, content: str = "", teacher: int | None = None) -> str:
    """The spec as one kind of step reads it, as JSON that `DistillationSpec.from_text` takes, `content` as a comment.

    `teacher`: only the teacher of that index is kept.
    """
    full = spec.model_dump(mode="json", exclude_defaults=True)
    if teacher is not None:
        full["teachers"] = [full["teachers"][teacher]]
    kept: dict[str, Any] = {}
    for section, fields in READS[step].items():
        if section == "*":
            kept |= full
        elif section == "teachers":
            kept["teachers"] = [_pick(t, fields) for t in full["teachers"]]
            if step in (
                "overlap",
                "prepare",
                "evaluate_student",
                "evaluate_teacher",
                "baseline",
            ):  # whether there is one, not which
                kept["teachers"] = [t | {"projection": {}} if t.get("projection") else t for t in kept["teachers"]]
        elif section in full:
            kept[section] = _pick(full[section], fields)
    kept = {"name": "view", "output": {"uri": "unused"}} | kept
    kept["data"] = {"train": ["unused"]} | kept.get("data", {})
    text = DistillationSpec.from_text(json.dumps(kept), source=f"the {step} step's part of the spec").to_json()
    return f"{text}  # {content}" if content else text


def _pick(section: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    return dict(section) if fields == ("*",) else {k: v for k, v in section.items() if k in fields}


def _split(overrides: str) -> list[str]:
    try:
        return shlex.split(overrides)
    except ValueError as e:
        raise InputError(f"overrides: {e}") from None


def _checkpoints(spec: DistillationSpec) -> str:
    """Beside an output that outlives its pod; local runs name a folder that does not depend on the output."""
    default = f"{spec.output.uri.rstrip('/')}.checkpoints" if output_lasts(spec) else ""
    return os.environ.get(CHECKPOINTS, default)


def output_lasts(spec: DistillationSpec) -> bool:
    """Whether what a pod publishes is there after it: at a URI, or on a volume of `resources.pvc`."""
    return storage.is_remote(spec.output.uri) or spec.resources.keeps(storage.normalize(spec.output.uri))


def own_folder(root: str, *inputs: str) -> str | None:
    """The folder of `root` that belongs to one set of inputs alone, so that nothing is resumed under others; None without a root."""
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    return f"{root.rstrip('/')}/{digest}" if root else None


def _named(field: str, uris: Iterable[str]) -> list[tuple[str, str]]:
    return [(field, uri) for uri in uris]


# -------------------------------------------------------------------------------------------------------- cache keys


class _Versions:
    """Digests of the models and files of a spec, each looked up once. Raises InputError for what is not there."""

    def __init__(self) -> None:
        self.known: list[dict[str, str]] = []

    def of(self, models: Iterable[StudentSpec | TeacherSpec], texts: Iterable[tuple[str, str]] = ()) -> str:
        """Digest of the code, of models with their tokenizers and W, and of texts (field, URI)."""
        parts = [code_digest()]
        for model in models:
            field = f"teachers.{model.id}" if isinstance(model, TeacherSpec) else "student"
            parts.append(self._lookup(f"{field}.model", model.model, model_version))
            if model.tokenizer:
                parts.append(self._lookup(f"{field}.tokenizer", model.tokenizer, model_version))
            if isinstance(model, TeacherSpec) and model.projection and model.projection.uri:
                parts.append(self._lookup(f"{field}.projection.uri", model.projection.uri, storage.fingerprint))
        parts += [self._lookup(field, uri, storage.fingerprint) for field, uri in texts]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _lookup(self, field: str, uri: str, version: Callable[[str], str]) -> str:
        found = next((entry["version"] for entry in self.known if entry["uri"] == uri), None)
        if found is None:
            try:
                found = version(uri)
            except InputError as e:
                raise InputError(f"{field}: {e}") from None
        if {"field": field, "uri": uri, "version": found} not in self.known:
            self.known.append({"field": field, "uri": uri, "version": found})
        return found


def model_version(ref: str) -> str:
    """What changes when a model does: the commit of a hub id, else `storage.fingerprint`. Raises InputError."""
    if storage.is_remote(ref) or Path(storage.normalize(ref)).exists():
        return storage.fingerprint(ref)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", ref) or ref.endswith(".gguf"):
        raise InputError(f"{ref}: no such file or folder")
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().model_info(ref, timeout=20).sha)
    except Exception as e:  # no network, or offline mode: then what was downloaded before
        cached = huggingface_hub.try_to_load_from_cache(ref, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent.name
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{ref}: no such folder, and not to be had from the hub ({type(e).__name__}: {reason})") from None


@cache
def code_digest() -> str:
    """Digest of the library's own source, so that results of other code are never taken from a cache."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------ running


@contextlib.contextmanager
def step(name: str, *outputs: Any) -> Iterator[Callable[[], dict[str, float]]]:
    """Runs a step's body: says when it begins and ends, and turns bad input into one line on stderr and exit code 2.

    `outputs`: the step's artifacts, whose metadata are given `started` (unix seconds) and `seconds`. Yields a function that
    tells the two so far, for a step that has no artifacts.
    """
    start = time.time()

    def times() -> dict[str, float]:
        return {"started": round(start, 1), "seconds": round(time.time() - start, 1)}

    print(f"{name}: started", flush=True)
    try:
        yield times
    except InputError as e:
        _stop(str(e))
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _stop(f"{e.filename or 'a working file'}: {os.strerror(e.errno)}")
    for output in outputs:
        output.metadata |= times()
    print(f"{name}: done in {times()['seconds']} s", flush=True)


def _stop(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
    if path := os.environ.get(ERROR_FILE):
        Path(path).write_text(line + "\n", encoding="utf-8")
    sys.exit(2)
