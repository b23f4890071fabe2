"""Cache keys that follow content: digests of models, files and the library's code."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from xtoken_core import storage
from xtoken_core.data.hub import hub_dataset
from xtoken_core.errors import InputError, blamed, in_one_line
from xtoken_core.identity import identity
from xtoken_core.results.workflow import ReadInput
from xtoken_core.spec import DistillationSpec, StudentSpec, TeacherSpec
from xtoken_core.training.checkpoints import training_identity
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.workflow.licences import licence_of
from xtoken_core.workflow.views import View


def own_folder(root: str, spec: View, inputs: TrainingInputs, baseline: bool, uris: Sequence[str]) -> str | None:
    """The folder of `root` for checkpoints of one training only, so that nothing is resumed under other inputs; None without a root.

    uris: where its rows and W are, which the names of their copies on this machine may not tell.
    """
    if not root:
        return None
    shards = [str(row) for row in inputs.rows[1:]]
    return f"{root.rstrip('/')}/{identity(training_identity(spec, inputs, baseline), spec.content, shards, list(uris))}"


class Versions:
    """Digests of the models and files of a spec, each looked up once. Raises InputError for what is not there."""

    def __init__(self) -> None:
        self.known: list[ReadInput] = []

    def of(
        self,
        models: Iterable[StudentSpec | TeacherSpec] = (),
        texts: Iterable[tuple[str, str]] = (),
        tokenizers: Iterable[StudentSpec | TeacherSpec] = (),
    ) -> str:
        """Digest of the code, of models with their tokenizers and W, of texts (field, URI), and of the tokenizers only of other models."""
        parts = [code_digest()]
        for model in models:
            parts.append(self._lookup(f"{_field(model)}.model", model.model, model_version))
            if model.tokenizer:
                parts.append(self._tokenizer(model))
            parts += [self._lookup(field, uri, storage.fingerprint) for field, uri in stored_matrices([model])]
        parts += [self._tokenizer(model) for model in tokenizers]
        parts += [self._lookup(field, uri, corpus_version) for field, uri in texts]
        return identity(*parts)

    def _tokenizer(self, model: StudentSpec | TeacherSpec) -> str:
        name = "tokenizer" if model.tokenizer else "model"
        return self._lookup(f"{_field(model)}.{name}", model.tokenizer or model.model, model_version)

    def _lookup(self, field: str, uri: str, version: Callable[[str], str]) -> str:
        found = next((entry.version for entry in self.known if entry.uri == uri), None)
        if found is None:
            try:
                found = version(uri)
            except InputError as e:
                raise InputError(f"{field}: {e}") from None
        licence = licence_of(uri) if version is model_version else None
        entry = ReadInput(field=field, uri=uri, version=found, licence=licence)
        if entry not in self.known:
            self.known.append(entry)
        return found


def check_models_are_there(spec: DistillationSpec) -> None:
    """Raises InputError, which names the field, for a model or tokenizer that is not to be had.

    transformers finds that out too, after a minute of attempts.
    """
    models: tuple[StudentSpec | TeacherSpec, ...] = (spec.student, *spec.teachers)
    for model in models:
        for name, ref in (("model", model.model), ("tokenizer", model.tokenizer)):
            if ref is not None:
                with blamed(f"{_field(model)}.{name}"):
                    model_version(ref)


def stored_matrices(models: Iterable[StudentSpec | TeacherSpec]) -> list[tuple[str, str]]:
    """Field and URI of every W that is stored."""
    projected = [(model, model.projection) for model in models if isinstance(model, TeacherSpec)]
    return [(f"{_field(model)}.projection.uri", w.uri) for model, w in projected if w is not None and w.uri]


def stored_scores(teachers: Iterable[TeacherSpec]) -> list[tuple[str, str]]:
    """Field and URI of all scores that another run has stored."""
    return [(f"{_field(t)}.scores.uri", t.scores.uri) for t in teachers if t.scores is not None and t.scores.uri]


def _field(model: StudentSpec | TeacherSpec) -> str:
    return f"teachers.{model.id}" if isinstance(model, TeacherSpec) else "student"


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
        why = f"{type(e).__name__}: {in_one_line(e)}"
        raise InputError(f"{ref}: no such folder, and not to be had from the hub ({why})") from None


def corpus_version(uri: str) -> str:
    """What changes when a corpus does: the commit of a hub data set, else `storage.fingerprint`. Raises InputError."""
    dataset = hub_dataset(uri)
    return storage.fingerprint(uri) if dataset is None else dataset.version()


@cache
def code_digest() -> str:
    """Digest of the library's own source, so that results of other code are never taken from a cache."""
    content = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        content.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]
