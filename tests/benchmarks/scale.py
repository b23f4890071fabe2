"""How a step's time grows with GPUs, by the model of `xtoken_core.costs`: `python -m tests.benchmarks.scale [--plot FILE.svg]`.

One JSON line per measured step, beside what the model says, then one per number of GPUs. These are of Phi-4-mini and Llama-3.2-3B sizes over
Llama-3.2-1B, rows of 2048, bf16, compiled, micro-batches of 4.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.benchmarks.training import LLAMA_1B, LLAMA_3B, LLAMA_7B, PHI_4_MINI, QWEN_4B, QWEN_7B
from xtoken_core.costs import GIB, ModelSize, StepShape, checkpoint_bytes, row_bytes, step_seconds

LENGTH, MICRO_BATCH = 2048, 4
ROWS_OF_A_STEP = 2048
"""At most, over all GPUs: 4.2 M tokens, beyond which larger steps teach little more."""
LORA_WEIGHTS = 40_370_176
"""Of adapters of rank 16 in all linear layers of QWEN_7B."""


@dataclass(frozen=True)
class Measured:
    """One measured step, of tests/benchmarks/results/2026-11-27-h100.md or 2026-11-27-h200x4.md."""

    name: str
    seconds: float
    teachers: tuple[PretrainedConfig, ...]
    shape: StepShape
    student: PretrainedConfig
    peak_gib: float | None = None
    """Of the GPU's memory, over all processes of the training; None where it is not known."""
    spread: int = 1
    """GPUs over which FSDP spreads the student's state."""

    def modelled_gib(self) -> float:
        """The same by the model."""
        teachers = [size(t).teacher_bytes(self.shape, 2, any(self.shape.fp8)) for t in self.teachers]
        return (size(self.student).student_bytes(self.shape, 2, self.spread) + sum(teachers)) / GIB

    def modelled(self) -> float:
        """Seconds by the model."""
        return step_seconds(size(self.student), [size(t) for t in self.teachers], self.shape).total


_TWO = (PHI_4_MINI, LLAMA_3B)
_USUAL = StepShape(24, LENGTH, MICRO_BATCH, compiled=True)
MEASURED = (
    Measured("H100, micro-batches of 4", 2.159, _TWO, _USUAL, LLAMA_1B, 53.2),
    Measured("H100, teachers in fp8", 1.749, _TWO, replace(_USUAL, fp8=(True, True)), LLAMA_1B, 47.9),
    Measured("H100, micro-batches of 1", 2.737, _TWO, replace(_USUAL, micro_batch=1), LLAMA_1B),
    Measured("H200", 2.094, _TWO, _USUAL, LLAMA_1B, 53.2),
    Measured("H200, one teacher", 1.489, (PHI_4_MINI,), _USUAL, LLAMA_1B, 44.9),
    Measured("four H200, DDP", 2.109, _TWO, replace(_USUAL, gpus=4), LLAMA_1B, 58.7),
    Measured("four H200, FSDP2", 2.109, _TWO, replace(_USUAL, gpus=4), LLAMA_1B, 49.4, spread=4),
    Measured(
        "H200, adapters of 7.6 B under 6.7 B, eager",
        2.309,
        (LLAMA_7B,),
        StepShape(4, 4096, recomputed=True, trained=LORA_WEIGHTS),
        QWEN_7B,
        34.3,
    ),
    Measured(
        "H200, a row of 32,768 tokens under 4 B, eager", 2.691, (QWEN_4B,), StepShape(1, 32768, recomputed=True), LLAMA_1B, 39.3
    ),
)


def size(config: PretrainedConfig) -> ModelSize:
    """Of a model of this shape."""
    with torch.device("meta"):
        return ModelSize.of(AutoModelForCausalLM.from_config(config))


def growth(student: ModelSize, teachers: list[ModelSize]) -> list[dict[str, float]]:
    """From one GPU to 1,024, with 24 rows on each until a step has ROWS_OF_A_STEP."""
    lines = []
    for gpus in (1, 2, 4, 8, 16, 64, 256, 1024):
        rows = min(24, ROWS_OF_A_STEP / gpus)
        seconds = step_seconds(
            student, teachers, StepShape(rows, LENGTH, min(MICRO_BATCH, int(rows)), compiled=True, gpus=gpus)
        ).total
        speed = rows * LENGTH * gpus / seconds
        trillion = 1e12 / speed / 3600
        lines.append({
            "gpus": gpus, "rows_a_gpu": rows, "step_seconds": round(seconds, 3), "tokens_per_second": round(speed),
            "trillion_tokens_hours": round(trillion, 1), "trillion_tokens_gpu_hours": round(trillion * gpus),
        })  # fmt: skip
    return lines


def plot(lines: list[dict[str, float]], path: Path) -> None:
    """Tokens a second by GPUs, beside what as many single GPUs would do."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    gpus = [line["gpus"] for line in lines]
    axes.loglog(gpus, [lines[0]["tokens_per_second"] * n for n in gpus], "--", color="0.6", label="as many single GPUs")
    axes.loglog(
        gpus, [line["tokens_per_second"] for line in lines], "o-", label="model, 24 rows a GPU, 2,048 rows a step at most"
    )
    axes.loglog([1, 4], [23_482, 93_257], "x", color="C3", markersize=8, label="measured: one H200, four of them")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("tokens a second")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="SVG to draw")
    options = parser.parse_args()
    student = size(LLAMA_1B)
    for step in MEASURED:
        found = step.modelled()
        error = round(found / step.seconds - 1, 3)
        print(json.dumps({"measured": step.name, "seconds": step.seconds, "model": round(found, 3), "error": error}))
        if step.peak_gib is not None:
            gib = step.modelled_gib()
            print(
                json.dumps(
                    {
                        "measured": step.name,
                        "gib": step.peak_gib,
                        "model": round(gib, 1),
                        "error": round(gib / step.peak_gib - 1, 3),
                    }
                )
            )
    lines = growth(student, [size(t) for t in (PHI_4_MINI, LLAMA_3B)])
    for line in lines:
        print(json.dumps(line))
    print(json.dumps({"bytes_of_rows_per_token": row_bytes(1, 1), "checkpoint_gb": checkpoint_bytes(student.parameters) / 1e9}))
    if options.plot:
        plot(lines, options.plot)


if __name__ == "__main__":
    main()
