"""A finished run's student in Kubeflow's Model Registry, if its verdict allows it."""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING

from xtoken_core.errors import InputError, in_one_line
from xtoken_core.report.answer import metrics
from xtoken_core.report.run import Run
from xtoken_core.report.verdict import bits_difference, interval
from xtoken_core.results.evaluation import Evaluation
from xtoken_core.results.subject import BEFORE, BEST, TWIN_BEST, TWIN_LAST
from xtoken_core.spec import DistillationSpec
from xtoken_core.spec.output import BetterThan, RegistrySpec

if TYPE_CHECKING:
    from model_registry import ModelRegistry


def check_registry(spec: DistillationSpec) -> None:
    """Raises InputError where the registry of a spec cannot be asked, or the run to be beaten is not there."""
    if spec.output.registry is not None:
        _connect(spec.output.registry)
    if isinstance(spec.output.promote_if, BetterThan):
        _earlier(spec.output.promote_if)


def promotion(spec: DistillationSpec, run: Run) -> tuple[bool, str]:
    """Whether `output.promote_if` lets the student of a finished run be registered, and why, in a sentence. Raises InputError."""
    rule = spec.output.promote_if
    if rule is None:
        return True, "Registered whatever its verdict: output.promote_if is not set."
    other, name = _rival(rule, run)
    difference = bits_difference(run.after, other)
    if difference is None:
        return False, f"Not registered: bits per byte of the student and of {name} were not both measured."
    better = difference.tone == "good"
    return better, f"{'Registered' if better else 'Not registered'}: against {name} {interval(difference)} bits per byte."


def register(spec: DistillationSpec, run: Run) -> str:
    """Registers the student that is published at `output.uri`, if its verdict allows it; returns what was done, in a sentence.

    The version carries the run's figures as metadata, and where the student is from: base model, teachers with their versions, data,
    commit. Raises InputError.
    """
    registry = spec.output.registry
    if registry is None:
        return "Not registered: output.registry is not set."
    allowed, reason = promotion(spec, run)
    if not allowed:
        return reason
    student, name = spec.published_student, registry.name or spec.name
    try:
        _connect(registry).register_model(
            name,
            spec.output.under(student),
            version=run.created,
            model_format_name="safetensors",
            model_format_version="1",
            version_description=reason,
            metadata={**metrics(run), **lineage(run)},
        )
    except Exception as e:  # the client passes on what its server and its HTTP library raise
        raise InputError(f"output.registry: {registry.server}: {type(e).__name__}: {in_one_line(e)}") from None
    return f"{reason} {name}, version {run.created}, at {registry.server}."


def lineage(run: Run) -> dict[str, str]:
    """What a student was made from: the spec's field of each model and corpus, with its version; modes; commit."""
    read = {entry.field: f"{entry.uri} ({entry.version})" for entry in run.inputs}
    if run.summary:
        read |= {f"teachers.{teacher}.mode": mode for teacher, mode in run.summary.modes.items()}
        if run.summary.environment and run.summary.environment.commit:
            read["commit"] = run.summary.environment.commit
    return read


def _rival(rule: str | BetterThan, run: Run) -> tuple[Evaluation | None, str]:
    """Whom the student must beat."""
    if isinstance(rule, BetterThan):
        return _earlier(rule).after, rule.better_than
    if rule == "better_than_before":
        return run.result(BEFORE), "itself before"
    twin = TWIN_BEST if run.result(BEST) else TWIN_LAST
    return run.result(twin), "its twin trained on cross-entropy only"


def _earlier(rule: BetterThan) -> Run:
    try:
        return Run.published(rule.better_than)
    except InputError as e:
        raise InputError(f"output.promote_if.better_than: {e}") from None


def _connect(registry: RegistrySpec) -> ModelRegistry:
    """A client of the registry, which has answered."""
    if importlib.util.find_spec("model_registry") is None:
        raise InputError("output.registry: needs the registry's client: pip install 'xtoken-pipelines[registry]'")
    from model_registry import ModelRegistry

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no token, which the server minds or does not
            return ModelRegistry(registry.server, author=registry.author)
    except Exception as e:
        raise InputError(f"output.registry: {registry.server}: {type(e).__name__}: {in_one_line(e)}") from None
