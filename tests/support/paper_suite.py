"""The suite `xtoken-paper` on hand-made rows in the published data sets' schemas: `python -m tests.support.paper_suite OUT MODEL SPEC`.

Writes the results of the model, and of one that answers everything rightly, with the prompts that they were given, as JSON, and how
the evaluation step ends for SPEC, whose task's data the hub does not have, and for a task that nobody knows.
HF_ENDPOINT names a hub that holds `paper_data`.
"""

from __future__ import annotations

import functools
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import DatasetDict
from transformers import AutoModelForCausalLM

from tests.support.cli import call
from xtoken_core.evaluation import harness as benchmarks
from xtoken_core.spec import EvaluationSpec
from xtoken_core.tokenization import load_tokenizer

MATH = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus")


def paper_data(subjects: list[str]) -> dict[str, dict[str, bytes]]:
    """{repository: {path: content}} of the five data sets, with a few rows in every split that is read; `subjects`: MMLU's."""
    numbers = range(6)
    gsm8k = [
        {"question": f"Ann has {n} figs and buys 3 more. How many has she?", "answer": f"She has {n}+3=<<{n}+3={n + 3}>>{n + 3}.\n#### {n + 3}"}
        for n in numbers
    ]  # fmt: skip
    math = [
        {"problem": f"What is ${n} + 1$?", "level": "Level 1", "type": "Algebra", "solution": f"It is $\\boxed{{{n + 1}}}$."}
        for n in numbers
    ]
    mmlu = [
        {"question": f"What is {n} + {n}?", "subject": "x", "choices": [str(2 * n + i) for i in range(4)], "answer": 0}
        for n in numbers
    ]
    winogrande = [
        {"sentence": f"The {n} cups did not fit in the boxes because the _ were too big.", "option1": "cups", "option2": "boxes", "answer": "1"}
        for n in numbers
    ]  # fmt: skip
    hellaswag = [
        {
            "ind": n, "activity_label": "Baking", "ctx_a": f"A cook takes {n} eggs.", "ctx_b": "she", "ctx": f"A cook takes {n} eggs. she",
            "endings": ["breaks them.", "flies away.", "is a fish.", "sings [title] low."], "source_id": f"s~{n}", "split": "val",
            "split_type": "indomain", "label": str(n % 2),
        }
        for n in numbers
    ]  # fmt: skip
    return {
        "openai/gsm8k": repository({"main": {"train": gsm8k, "test": gsm8k}}),
        "cais/mmlu": repository({subject: {"test": mmlu, "dev": mmlu} for subject in subjects}),
        "EleutherAI/hendrycks_math": repository({subject: {"train": math, "test": math} for subject in MATH}),
        "allenai/winogrande": repository({"winogrande_xl": {"train": winogrande, "validation": winogrande}}),
        "Rowan/hellaswag": repository({"default": {"train": hellaswag, "validation": hellaswag}}),
    }


def repository(configs: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, bytes]:
    """A data set's files: a card that names its configurations, and a parquet file for each split."""
    files = {f"{config}/{split}-00000-of-00001.parquet": _parquet(rows) for config, splits in configs.items() for split, rows in splits.items()}  # fmt: skip
    card = [
        {"config_name": config, "data_files": [{"split": split, "path": f"{config}/{split}-*"} for split in splits]}
        for config, splits in configs.items()
    ]
    return {"README.md": f"---\n{yaml.safe_dump({'configs': card})}---\n".encode(), **files}


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def answer(prompt: str) -> str:
    """What a model that knows would go on with: worked answers in the data sets' own words."""
    if prompt.startswith("Question:"):
        number = int(re.findall(r"Ann has (\d+) figs", prompt)[-1])
        return f" She has {number}+3=<<{number}+3={number + 3}>>{number + 3}.\n#### {number + 3}\n\n"
    number = int(re.findall(r"What is \$(\d+) \+ 1", prompt)[-1])
    return f" The answer is ${number + 1}$.\n\n"


def is_right(prompt: str, continuation: str) -> bool:
    """Whether a continuation is the right choice."""
    if prompt.endswith("Answer:"):  # MMLU
        return continuation == " A"
    if "eggs" in prompt:  # HellaSwag
        return continuation == (" flies away." if int(re.findall(r"takes (\d+) eggs", prompt)[-1]) % 2 else " breaks them.")
    return prompt.endswith("the cups")  # Winogrande


def made(language_model: Any, prompts: list[str], knows: bool) -> Any:
    """The function that makes the harness's model. It notes every context that it is given; if it `knows`, its answers are right."""

    def make(*args: Any) -> Any:
        lm = language_model(*args)
        likelihoods, generate = lm.loglikelihood, lm.generate_until

        def loglikelihood(requests: list[Any]) -> list[Any]:
            prompts.extend(request.args[0] for request in requests)
            right = [(0.0 if is_right(*request.args) else -9.0, True) for request in requests]
            return right if knows else likelihoods(requests)

        def generate_until(requests: list[Any]) -> list[str]:
            prompts.extend(request.args[0] for request in requests)
            return [answer(request.args[0]) for request in requests] if knows else generate(requests)

        lm.loglikelihood, lm.generate_until = loglikelihood, generate_until
        return lm

    return make


def remembered(load: Callable[..., DatasetDict]) -> Callable[..., DatasetDict]:
    """The same, of which nothing is loaded twice."""
    kept = functools.cache(load)
    return lambda **asked: DatasetDict(kept(**asked))


def main(out: str, folder: str, spec: str) -> None:
    """Runs the suite, two documents of each task, with the model as it is and then with one that knows; then evaluates `spec`."""
    evaluation = EvaluationSpec(tasks=("xtoken-paper",), limit=2)
    model, tok = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    plain, told = benchmarks._language_model, {}
    datasets.load_dataset = remembered(datasets.load_dataset)  # by which the harness loads
    yaml.SafeLoader = yaml.CSafeLoader  # ten times as fast, on cards of 57 configurations
    for name in ("model", "oracle"):
        prompts: list[str] = []
        benchmarks._language_model = made(plain, prompts, knows=name == "oracle")
        scores = benchmarks.run_tasks(evaluation, model, tok, folder)
        told[name] = {"tasks": {n: s.model_dump() for n, s in scores.items()}, "prompts": prompts}
    for name, tasks in (("refused", "arc_easy"), ("unknown", "nonesuch")):
        evaluated = (
            "--spec",
            spec,
            "--set",
            f"evaluation.tasks=[{tasks}]",
            "--group",
            "student-before",
            "--results",
            f"{out}.results",
        )
        done = call("components.evaluate", *evaluated)
        told[name] = [done.returncode, done.stderr]
    Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
