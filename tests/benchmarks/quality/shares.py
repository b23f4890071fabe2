"""A teacher of one domain and the rows without one, small enough for a CPU: `python -m tests.benchmarks.quality.shares STUDENT TEACHER DATA OUT [ARM:SEED ...]`

DATA is what `python -m tests.benchmarks.quality prepare` made of mixed text. Arms, each trained on the same 480 rows of 256 tokens, half of
each domain, with the teacher's 64 likeliest cells of the first domain's rows:

    ce      cross-entropy alone
    masked  the teacher's KD on its rows beside cross-entropy on all of them, as if all rows were taught
    taught  the same by `TeacherBatch.taught`: a row weighs the same, taught or not

A line of JSON an arm is added to OUT: held-out bits per byte at half of the steps and at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.benchmarks.quality.rows import Rows, orders
from tests.benchmarks.quality.train import bits_per_byte, learning_rate
from xtoken_core.losses import (
    CellCut,
    CellScores,
    StepTotals,
    StudentBatch,
    TeacherBatch,
    batch_counts,
    distillation_loss,
    dynamic_scale,
    loss_sums,
)
from xtoken_core.models import final_hidden, head_logits, load_model
from xtoken_core.projection import Projection
from xtoken_core.spec import LossSpec

STEPS, BATCH, LENGTH, HELD_OUT, CELLS, RATE = 60, 8, 256, 40, 64, 3e-4


def cropped(path: Path, rows: Tensor | None = None) -> Rows:
    """Some rows of a file of `prepare`, of LENGTH tokens. rows: their numbers; None: the first ones."""
    found = Rows.load(path, torch.device("cpu"), HELD_OUT if rows is None else None).arrays
    if rows is not None:
        found = {name: array[rows] for name, array in found.items()}
    of_chunks = ("chunk_valid", "chunk_exact", "domain")
    return Rows({name: array if name.endswith(of_chunks) else array[:, :LENGTH] for name, array in found.items()})


def training_rows(data: Path) -> Rows:
    """As many rows of the first domain as of the others, those of the first domain first."""
    domain = Rows.load(data / "train.npz", torch.device("cpu")).arrays["domain"]
    generator, half = torch.Generator().manual_seed(5), STEPS * BATCH // 2
    groups = [flags.nonzero()[:, 0] for flags in (domain == 0, domain != 0)]
    return cropped(data / "train.npz", torch.cat([g[torch.randperm(len(g), generator=generator)[:half]] for g in groups]))


@torch.no_grad()
def scores(teacher: str, projection: Projection, rows: Rows, number: int = 0) -> CellScores:
    """The likeliest cells of teacher `number` over its half of the rows: the first one's first, the second one's then."""
    model = load_model(teacher, torch.bfloat16)
    assert projection.cells is not None and projection.teacher_vocab_size is not None
    cut, parts = CellCut.of(projection.cells, projection.teacher_vocab_size, CELLS, 1.0), []
    half = len(rows) // 2
    for index in torch.arange(number * half, (number + 1) * half).split(BATCH):
        ids = rows.teacher_ids(number, index)
        parts.append(cut(head_logits(model, final_hidden(model, ids), projection.teacher_vocab_size), ids))
    columns = zip(*((part.values, part.indices, part.rest, part.total, part.realised) for part in parts), strict=True)
    values, indices, rest, total, realised = map(torch.cat, columns)
    return CellScores(values, indices, rest, total, realised, parts[0].num_cells, parts[0].vocab_size)


def hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Final hidden states, products in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        return final_hidden(model, ids).to(torch.bfloat16)


def teacher_of(number: int, rows: Rows, index: Tensor, said: CellScores, projection: Projection) -> TeacherBatch:
    """What teacher `number` says of some rows: it teaches those of its half."""
    half = len(rows) // 2
    own = (rows.arrays["domain"][index] == 0) == (number == 0)
    places = (index - number * half).clamp(0, half - 1)
    fields = dict[str, Any](rows.teacher_fields(number, index))
    logits = said.over_positions(lambda x: x[places])
    return TeacherBatch(logits, projection=projection, mode="partition_kl", taught=own, **fields)


def heard(arm: str, rows: Rows, index: Tensor, said: CellScores, projection: Projection) -> list[TeacherBatch]:
    """The teacher as an arm hears it."""
    if arm == "ce":
        return []
    teacher = teacher_of(0, rows, index, said, projection)
    if arm == "taught":
        return [teacher]
    assert teacher.chunk_valid is not None and teacher.taught is not None
    return [replace(teacher, chunk_valid=teacher.chunk_valid & teacher.taught[:, None], taught=None)]


def bits(model: PreTrainedModel, rows: Rows, vocabulary: int) -> float:
    """Bits per byte of held-out rows."""
    return bits_per_byte(model, partial(hidden, model), rows, vocabulary, BATCH)


def train(
    run: tuple[str, int],
    model: PreTrainedModel,
    rows: Rows,
    vocabulary: int,
    hear: Callable[[int, Tensor], list[TeacherBatch]],
    measure: Callable[[], dict[str, float]],
) -> dict:
    """Trains the model, KD falling from all of CE to nothing; `measure()` halfway and at the end.

    run: arm and seed. hear: from step and rows to what the teachers say of them.
    """
    arm, seed = run
    spec, scale, halfway = LossSpec(mode="partition_kl"), None, {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, STEPS))
    for step, index in enumerate(orders(len(rows), STEPS, BATCH, seed)):
        batch = rows.student(index)
        masks = batch["input_ids"], batch["token_mask"], batch["sample_mask"]
        teachers = hear(step, index)
        totals = StepTotals.from_sums(batch_counts(*masks, teachers, spec), teachers, spec, scale=scale if teachers else 1.0)
        totals = replace(totals, course=1 - step / (STEPS - 1))
        logits = head_logits(model, hidden(model, batch["input_ids"]), vocabulary)
        if totals.scale is None:
            sums = loss_sums(StudentBatch.of(logits, *masks), teachers, spec, totals)
            totals = totals.with_scale(dynamic_scale(sums, totals, spec))
        out = distillation_loss(logits, *masks, teachers, spec, totals=totals)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        scale = dynamic_scale(out.sums, totals, spec)
        print(f"{arm} {seed}: step {step + 1} of {STEPS}, loss {out.loss:.3f}, ce {out.metrics['ce_loss']:.3f}", flush=True)
        if step + 1 == STEPS // 2:
            halfway = measure()
    return {"arm": arm, "seed": seed, "steps": STEPS, "halfway": halfway, "end": measure()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.quality.shares", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name, kind in {"student": str, "teacher": str, "data": Path, "out": Path}.items():
        parser.add_argument(name, type=kind)
    parser.add_argument("runs", nargs="*", default=["ce:0", "masked:0", "taught:0"])
    options = parser.parse_args()
    projection, rows = Projection.load(options.data / "w-0.safetensors"), training_rows(options.data)
    held_out = {path.stem: cropped(path) for path in sorted(options.data.glob("*.npz")) if path.stem != "train"}
    said = scores(options.teacher, projection, rows)
    for run in options.runs:
        arm, _, seed = run.partition(":")
        model = load_model(options.student).train()

        def measure(model: PreTrainedModel = model) -> dict[str, float]:
            return {name: bits(model, own, len(projection.indices)) for name, own in held_out.items()}

        def hear(_: int, index: Tensor, arm: str = arm) -> list[TeacherBatch]:
            return heard(arm, rows, index, said, projection)

        line = train((arm, int(seed or 0)), model, rows, len(projection.indices), hear, measure)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
