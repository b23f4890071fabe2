"""The student's model card: where it comes from, what that asks of those who pass it on, how good it is, how to load it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

import yaml

from xtoken_core.report.answer import answer_lines
from xtoken_core.report.markup import code, plain, yaml_block
from xtoken_core.report.run import Run

ASKED = {
    "gemma": "Gemma's terms of use also bind models that were trained on Gemma's outputs: pass the terms and the use restrictions "
    "on with the student, and say that it was changed. Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms.",
    "llama": "Llama's community licence asks that a model trained on Llama's outputs has a name that begins with `Llama`, shows "
    "*Built with Llama*, comes with a copy of the licence, and keeps to its acceptable use policy.",
    "apache-2.0": "Apache 2.0: keep the licence and the notices.",
    "mit": "MIT: keep the licence and the copyright notice.",
}
"""What a licence, by the beginning of its name, asks of who passes the student on. No legal advice."""


def model_card(run: Run, checkpoint: str) -> str:
    """README.md of a published student, in the form that model hubs read; `checkpoint`: best or last."""
    front = yaml.safe_dump(_front(run), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n".join(_body(run, checkpoint)) + "\n"


def _front(run: Run) -> dict[str, object]:
    student = run.spec["student"]["model"]
    licence = _licences(run).get("student.model")
    return {
        **({"license": licence} if licence else {}),
        "base_model": student,
        "base_model_relation": "finetune",  # adapters are merged into the weights
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "x-token"],
    }


def _body(run: Run, checkpoint: str) -> Iterator[str]:
    teachers = ", ".join(code(teacher["model"]) for teacher in run.spec["teachers"] if teacher["id"] in run.heard)
    learned = f"distilled from {teachers}" if teachers else "trained on cross-entropy only, as a pilot chose"
    yield f"# {plain(run.name)}"
    yield f"\n{code(run.spec['student']['model'])}, {learned}. This is the {checkpoint} checkpoint."
    yield "\n## How good it is\n"
    yield from answer_lines(run)
    yield "\n## How to load it\n"
    yield "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
    yield 'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")\n```'
    yield "\n```\nvllm serve .\n```"
    yield "\n## Where it comes from\n"
    yield "| what | from | version | licence |\n|---|---|---|---|"
    for entry in run.inputs:
        cells = (plain(entry.field), code(_place(entry.uri)), code(entry.version), plain(entry.licence or "-"))
        yield f"| {' | '.join(cells)} |"
    yield "\n## What the licences ask\n"
    yield from _asked(run)
    yield "\n## Spec\n"
    yield yaml_block(yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True))


def _licences(run: Run) -> dict[str, str | None]:
    """By field, of the models that have gone into the student: a teacher that a pilot left out has not."""
    unheard = {f"teachers.{teacher}.model" for teacher in run.teachers if teacher not in run.heard}
    return {e.field: e.licence for e in run.inputs if e.field.endswith(".model") and e.field not in unheard}


def _asked(run: Run) -> Iterator[str]:
    """A line for each licence that is known, and one for the models whose card names none."""
    licences = _licences(run)
    for field, licence in licences.items():
        known = next((words for name, words in ASKED.items() if licence and licence.lower().startswith(name)), None)
        if licence is None:
            yield f"- {plain(field)}: its card names no licence; look it up before you pass the student on."
        else:
            yield f"- {plain(field)} ({plain(licence)}): {known or 'read what it asks before you pass the student on.'}"
    if not licences:
        yield "- Unknown: the run noted no models."


def _place(uri: str) -> str:
    """A URI as it may be shown: of a local path the last two parts only."""
    return uri if "://" in uri or not PurePath(uri).is_absolute() else "/".join(PurePath(uri).parts[-2:])
