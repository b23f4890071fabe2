"""Benchmarks through EleutherAI's lm-evaluation-harness (`lm-eval`, extra `eval`)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from xtoken_core.errors import InputError
from xtoken_core.evaluation.bits_per_byte import opener_of
from xtoken_core.evaluation.intervals import Z95, share_interval
from xtoken_core.results.evaluation import TaskScore
from xtoken_core.spec import EvaluationSpec
from xtoken_core.tokenization import row_bos

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

OFFLINE_TASKS = Path(__file__).parent / "tasks"

PREFERRED_METRICS = ("acc_norm,none", "acc,none", "exact_match,flexible-extract", "exact_match,none")
"""Which metric stands for a task that has several; all are shares of right answers."""


@dataclass(frozen=True)
class Job:
    """Tasks of one place, run together."""

    names: tuple[str, ...]
    folder: Path | None = None
    """Holds the tasks' .yaml files, and data they name by relative paths; None: the harness's own tasks."""
    shots: int | None = None
    """None: each task's own."""


SUITES = {
    # the paper's benchmarks, in its setting
    "xtoken-paper": Job(("gsm8k", "mmlu", "hendrycks_math", "winogrande", "hellaswag"), shots=3),
    # what needs no hub
    "xtoken-offline": Job(("xtoken_gsm_symbolic", "xtoken_humaneval_choice"), OFFLINE_TASKS),
}


def run_tasks(
    evaluation: EvaluationSpec, model: PreTrainedModel, tok: PreTrainedTokenizerFast, folder: str | Path | None
) -> dict[str, TaskScore]:
    """Runs `evaluation.tasks`: names of the harness, suites of `SUITES`, folders (also fsspec URIs) of tasks and their data.

    Returns the score of each task or group of tasks.

    Args:
        evaluation: tasks, num_fewshot and limit are read.
        model: on its device.
        tok: its tokenizer.
        folder: Hugging Face folder or hub id of this very model and tokenizer, for vLLM; None: only `model` will do.

    Raises InputError, also for data that cannot be had.
    """
    jobs = plan_tasks(evaluation.tasks)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells at length what it was told
    lm = _language_model(model, tok, folder)
    results: dict[str, TaskScore] = {}
    for job in jobs:
        shots = job.shots if evaluation.num_fewshot is None else evaluation.num_fewshot
        results |= _run(job, lm, shots, evaluation.limit)
    return results


def plan_tasks(tasks: Sequence[str]) -> list[Job]:
    """The jobs that `evaluation.tasks` stand for. Raises InputError where lm-eval is missing, or for a task nobody knows."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise InputError("evaluation.tasks: need lm-evaluation-harness: pip install 'xtoken-pipelines[eval]'")
    return [_job(task) for task in tasks]


@cache
def _manager(folder: Path | None) -> TaskManager:
    """The tasks of a folder, or the harness's own, which take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder and str(folder), include_defaults=folder is None)


def _job(task: str) -> Job:
    from xtoken_core.storage import local_copy

    if task in SUITES:
        return SUITES[task]
    if "/" in task:
        folder = local_copy(task)
        names = _manager(folder).all_subtasks
        if not names:
            raise InputError(f"evaluation.tasks: {task}: no task (.yaml) in it")
        return Job(tuple(names), folder)
    if task not in _manager(None).all_tasks:
        raise InputError(f"evaluation.tasks: {task}: no task of lm-evaluation-harness, and no suite ({', '.join(SUITES)})")
    return Job((task,))


def _language_model(model: PreTrainedModel, tok: PreTrainedTokenizerFast, folder: str | Path | None) -> LM:
    """The harness's view of the model: in vLLM where that is installed and there are a GPU and a folder to load."""
    begin: dict[str, Any] = {"add_bos_token": row_bos(tok) is not None, "prefix_token_id": opener_of(tok)}
    if folder is not None and torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None:
        from lm_eval.models.vllm_causallms import VLLM

        model.cpu()  # vLLM loads its own copy
        torch.cuda.empty_cache()
        return VLLM(pretrained=str(folder), dtype="bfloat16", gpu_memory_utilization=0.8, **begin)
    from lm_eval.models.huggingface import HFLM

    return HFLM(model, tokenizer=tok, batch_size=16 if torch.cuda.is_available() else 4, **begin)


def _run(job: Job, lm: LM, shots: int | None, limit: int | None) -> dict[str, TaskScore]:
    from lm_eval import simple_evaluate

    try:
        with contextlib.chdir(job.folder) if job.folder else contextlib.nullcontext():
            found = simple_evaluate(
                lm,
                tasks=list(job.names),
                num_fewshot=shots,
                limit=limit,
                task_manager=_manager(job.folder),
                bootstrap_iters=1000,
                log_samples=True,
            )
    except (OSError, ConnectionError, ValueError) as e:  # what datasets raises for data that is not there
        raise InputError(f"evaluation.tasks: {', '.join(job.names)}: {str(e).strip().splitlines()[0]}") from e
    assert found is not None  # only ranks other than 0 get nothing
    members = {
        name: [m for m in inside if _metrics(found["results"].get(m, {}))] for name, inside in found["group_subtasks"].items()
    }
    parts = {part for inside in members.values() for part in inside}
    return {
        name: _score(name, found).model_copy(update={"parts": {part: _score(part, found) for part in members.get(name, [])}})
        for name in found["results"]
        if _metrics(found["results"][name]) and name not in parts
    }


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in result.items() if "," in key and "_stderr" not in key and isinstance(value, float)}


def _score(name: str, found: dict[str, Any]) -> TaskScore:
    result, tasks = found["results"][name], _tasks_of(name, found)
    metrics = _metrics(result)
    metric = next((m for m in PREFERRED_METRICS if m in metrics), next(iter(metrics)))
    value, (measure, _, kind) = metrics[metric], metric.partition(",")
    error = result.get(f"{measure}_stderr,{kind}")
    stderr = error if isinstance(error, float) else None
    samples = sum(found["n-samples"][task]["effective"] for task in tasks)
    shots = {found["n-shot"][task] for task in tasks}
    low, high, answers = None, None, {}
    if metric in PREFERRED_METRICS:
        low, high = share_interval(value, samples)
        answers = _answers(measure, kind, [entry for task in tasks for entry in found["samples"][task]])
    elif stderr is not None:
        low, high = value - Z95 * stderr, value + Z95 * stderr
    return TaskScore(
        metric=metric,
        value=value,
        stderr=stderr,
        low=low,
        high=high,
        samples=samples,
        shots=shots.pop() if len(shots) == 1 else None,
        higher_is_better=found["higher_is_better"].get(name, {}).get(measure, True),
        metrics=metrics,
        **answers,
    )


def _answers(measure: str, kind: str, entries: list[dict[str, Any]]) -> dict[str, str]:
    """Which questions were answered rightly, and a digest of the questions."""
    of_kind = [entry for entry in entries if entry["filter"] == kind]
    digest = hashlib.sha256("".join(entry["doc_hash"] for entry in of_kind).encode()).hexdigest()[:16]
    return {"scores": "".join(str(int(entry[measure])) for entry in of_kind), "questions": digest}


def _tasks_of(name: str, found: dict[str, Any]) -> list[str]:
    """The tasks of a group, of its groups too; a task's own name."""
    inside = found["group_subtasks"].get(name)
    return [name] if not inside else [task for part in inside for task in _tasks_of(part, found)]
