"""Runs from Python: `result = run(spec)`, then `result.verdict`, `result.student()`, `result.report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.local import run_locally
from xtoken_core import storage
from xtoken_core.report.run import Run
from xtoken_core.report.verdict import Verdict, verdict
from xtoken_core.spec import DistillationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Result:
    """A finished run."""

    spec: DistillationSpec
    run: Run
    """All figures of its report."""

    @property
    def verdict(self) -> Verdict:
        """Whether distillation helped; as text, the sentences of the report."""
        return verdict(self.run)

    @property
    def report(self) -> str:
        """Path or URI of the HTML report."""
        return self.spec.output.under("report.html")

    def student(self, checkpoint: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The student and its tokenizer, as transformers load them.

        checkpoint: best or last; default: best, where there is validation data to choose it by.
        """
        place = self.student_place(checkpoint)
        return _loaded(place, place)

    def former_student(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The model that the student was before, of the layers that it has kept, and its tokenizer."""
        from xtoken_core.layers import prune_layers

        student = self.spec.student
        model, tokenizer = _loaded(student.model, student.tokenizer or student.model)
        if student.keep_layers is not None:
            prune_layers(model, student.keep_layers)
        return model, tokenizer

    def student_place(self, checkpoint: str | None = None) -> str:
        """Path or URI of the student's folder."""
        folder = f"student/{checkpoint}" if checkpoint else self.spec.published_student
        return self.spec.output.under(folder)


def run(spec: DistillationSpec | str | Path, runs: str | Path = "runs") -> Result:
    """Runs a spec, or the spec in a file, on this machine.

    `runs`: folder for intermediate results, logs and the cache. Raises InputError for bad input, RunFailed where a step fails.
    """
    if not isinstance(spec, DistillationSpec):
        spec = DistillationSpec.from_yaml(spec)
    return Result(spec, run_locally(spec, Path(runs)))


def load(uri: str) -> Result:
    """A run that has finished earlier, here or on a cluster; `uri`: what its output.uri said. Raises InputError."""
    place, finished = uri.rstrip("/"), Run.published(uri)
    return Result(DistillationSpec.from_yaml(storage.local_copy(f"{place}/spec.yaml"), [f"output.uri={place}"]), finished)


def _loaded(model: str, tokenizer: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    from xtoken_core.models import load_model
    from xtoken_core.tokenization import load_tokenizer

    return load_model(model).eval(), load_tokenizer(tokenizer)
