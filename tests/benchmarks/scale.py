"""How a step's time grows with GPUs, by arithmetic, beside what was measured: `python -m tests.benchmarks.scale [--plot FILE.svg]`.

Operations come from `xtoken_core.costs`. Three constants are fitted to measurements: the share of the rate of a large matrix product that
teachers and student reach, and what several processes on one host cost each other. One JSON line per measured step, then one per number
of GPUs. Everything is of Phi-4-mini and Llama-3.2-3B sizes over Llama-3.2-1B, rows of 2048, bf16, compiled, unless a line says otherwise.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.benchmarks.training import LLAMA_1B, LLAMA_3B, PHI_4_MINI, QWEN_4B
from xtoken_core.costs import ModelSize, row_bytes

LENGTH = 2048
PRODUCT = 790e12
"""Operations a second of a large bf16 product, H100 and H200, measured in the same runs."""
TEACHERS, STUDENT = 0.535, 0.365
"""Shares of it, fitted to the steps of November 24th."""
TEACHERS_NOW = 0.66
"""With many rows a forward and compiled layers: from one step of November 27th."""
CROWDED = 0.3
"""Seconds that a step of 24 rows takes longer where four ranks share a host; measured, not explained by traffic (0.02 s)."""
NVLINK, NETWORK = 355e9, 50e9
"""Bytes a second of an all-reduce on a host, measured; of each GPU's share of the network, assumed (400 Gb/s)."""
PER_HOST = 8
ROWS_OF_A_STEP = 2048
"""At most, over all GPUs: 4.2 M tokens, beyond which larger steps teach little more."""


@dataclass(frozen=True)
class Measured:
    """One measured step."""

    name: str
    teachers: tuple[PretrainedConfig, ...]
    rows: int
    seconds: float
    teacher_share: float = TEACHERS
    gpus: int = 1


MEASURED = (
    Measured("H100, 96 rows, 2026-11-24", (PHI_4_MINI, LLAMA_3B), 96, 12.99),
    Measured("H100, Qwen3-4B + Llama-3.2-3B, 32 rows, 2026-11-24", (QWEN_4B, LLAMA_3B), 32, 4.23),
    Measured("H200, 24 rows, a7f22bc", (PHI_4_MINI, LLAMA_3B), 24, 2.83),
    Measured("H200, 96 rows, a7f22bc", (PHI_4_MINI, LLAMA_3B), 96, 11.75),
    Measured("four H200, DDP, 24 rows each, a7f22bc", (PHI_4_MINI, LLAMA_3B), 24, 3.37, gpus=4),
    Measured("H100, 24 rows, 2026-11-27", (PHI_4_MINI, LLAMA_3B), 24, 2.737, TEACHERS_NOW),
)


def size(config: PretrainedConfig) -> ModelSize:
    """Of a model of this shape."""
    with torch.device("meta"):
        return ModelSize.of(AutoModelForCausalLM.from_config(config))


def step_seconds(student: ModelSize, teachers: list[ModelSize], rows: float, gpus: int, teacher_share: float) -> float:
    """A step with `rows` on each GPU: teachers one after the other, student, gradients' all-reduce (DDP, none of it hidden)."""
    tokens = round(rows * LENGTH)
    taught = sum(t.forward_flops(tokens, LENGTH) for t in teachers) / (teacher_share * PRODUCT)
    learned = student.training_flops(tokens, LENGTH, recomputed=False) / (STUDENT * PRODUCT)
    gradients = 4 * student.parameters
    host = min(gpus, PER_HOST)
    reduced = 2 * (host - 1) / host * gradients / NVLINK
    if gpus > PER_HOST:  # every GPU of a host carries its part between hosts
        reduced += 2 * gradients / PER_HOST / NETWORK
    return taught + learned + reduced + (CROWDED * rows / 24 if gpus > 1 else 0)


def growth(student: ModelSize, teachers: list[ModelSize]) -> list[dict[str, float]]:
    """From one GPU to 1,024, with 24 rows on each until a step has ROWS_OF_A_STEP."""
    lines = []
    for gpus in (1, 2, 4, 8, 16, 64, 256, 1024):
        rows = min(24, ROWS_OF_A_STEP / gpus)
        seconds = step_seconds(student, teachers, rows, gpus, TEACHERS_NOW)
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
    axes.loglog([1, 4], [17_960, 58_344], "x", color="C3", markersize=8, label="measured: one H100; four H200, before")
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
        seconds = step_seconds(student, [size(t) for t in step.teachers], step.rows, step.gpus, step.teacher_share)
        error = round(seconds / step.seconds - 1, 3)
        print(json.dumps({"measured": step.name, "seconds": step.seconds, "model": round(seconds, 2), "error": error}))
    lines = growth(student, [size(t) for t in (PHI_4_MINI, LLAMA_3B)])
    for line in lines:
        print(json.dumps(line))
    print(
        json.dumps(
            {"bytes_of_rows_per_token": row_bytes(1, 1), "checkpoint_gb": student.checkpoint_bytes(student.parameters) / 1e9}
        )
    )
    if options.plot:
        plot(lines, options.plot)


if __name__ == "__main__":
    main()
