"""What each recipe of docs/recipes.md costs, as its table there: `python -m tests.benchmarks.recipes`.

The figures are those of `xtoken plan` on the committed specs. Models are stood for by their configurations, which is all that a plan reads
of them; the data are nobody's, so rows and disk for them are left out.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from pipelines.compiling import SPECS
from tests.benchmarks.training import LLAMA_1B, LLAMA_3B, PHI_4_MINI, QWEN_4B
from xtoken_core.costs import GIB, step_seconds
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.plan import model_sizes, plan, step_shape

CONFIGS = {
    "meta-llama/Llama-3.2-1B": LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA_1B,
    "meta-llama/Llama-3.2-3B": LLAMA_3B,
    "microsoft/Phi-4-mini-instruct": PHI_4_MINI,
    "Qwen/Qwen3-4B": QWEN_4B,
    "Qwen/Qwen3-4B-Instruct-2507": QWEN_4B,
}
HEAD = """| spec | tokens | GPUs | hours | GPU hours | a twin adds | GPU memory, GiB | evaluations, GiB of the host | checkpoints and students, GiB |
|---|---|---|---|---|---|---|---|---|
"""


def here(spec: DistillationSpec, folder: Path) -> DistillationSpec:
    """The spec with every model a folder that holds its configuration, and no data."""

    def stand_in(name: str) -> str:
        place = folder / name.replace("/", "--")
        config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | {"dtype": "bfloat16"})
        config.save_pretrained(place)
        return str(place)

    student = spec.student.model_copy(update={"model": stand_in(spec.student.model)})
    teachers = tuple(teacher.model_copy(update={"model": stand_in(teacher.model)}) for teacher in spec.teachers)
    data = spec.data.model_copy(update={"train": ("/absent.jsonl",)})
    return spec.model_copy(update={"student": student, "teachers": teachers, "data": data})


def row(name: str, spec: DistillationSpec) -> str:
    """A line of the table."""
    found, sizes = plan(spec), model_sizes(spec)
    gpus = spec.resources.nodes * spec.resources.gpus_per_node
    assert found.steps and found.gpu_hours and found.training_tokens_at_most
    scored = [sizes[f"teachers.{teacher.id}.model"] for teacher in spec.teachers if teacher.scores]
    without = step_seconds(
        sizes["student.model"], scored, replace(step_shape(spec, sizes), fp8=())
    )  # of the training as a twin has it
    twin, scoring = (found.steps * seconds * gpus / 3600 for seconds in (without.total - without.teachers, without.teachers))
    turns, resident = (found.memory[step] / GIB for step in ("distill", "distill-teachers-resident"))
    memory = f"{turns:.0f}" if round(turns) == round(resident) else f"{turns:.0f}, with every teacher resident {resident:.0f}"
    disk = (found.disk_bytes["checkpoints"] + found.disk_bytes["student"]) / GIB
    cells = [
        f"`{name}`", f"{found.training_tokens_at_most / 1e6:,.0f} M", f"{gpus}", f"{found.gpu_hours / gpus:.1f}", f"{found.gpu_hours:.1f}" + (f", scoring {scoring:.1f} once" if scored else ""),
        f"{twin:.1f}", memory, f"{max(found.host_memory.values()) / GIB:.0f}", f"{disk:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    """The table, a line for each committed spec whose models are on a hub."""
    specs = {path.name: DistillationSpec.from_yaml(path) for path in sorted(SPECS.glob("*.yaml"))}
    with tempfile.TemporaryDirectory() as folder:
        return HEAD + "".join(
            row(name, here(spec, Path(folder))) for name, spec in specs.items() if spec.student.model in CONFIGS
        )


if __name__ == "__main__":
    print(table(), end="")
