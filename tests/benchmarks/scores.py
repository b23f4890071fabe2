"""Scores of a teacher that runs once: `python -m tests.benchmarks.scores [--models models] [--rows 12] [--steps 5] [--only k|speed]`.

The demo's models (`python -m pipelines.demo_models`) on the demo's text, on a CPU: SmolLM2-135M learns from Gemma-3-270M, which has another
tokenizer. JSON lines:

    k       KD and its gradient by the student's hidden states from k cells, against the running teacher's, and from lists of k tokens
    score   tokens a CPU second of scoring, bytes a token
    step    CPU seconds of an optimizer step of a student alone (CE) and on scores, rows read and collated, in turns in one process, and of the forward
            that a running teacher would add. Seconds of the processor, not of the clock: other processes do not show in them as much. A second
            student on the same scores is the same step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtoken_core.data.batch import Collator
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.data.reading import load_rows
from xtoken_core.losses import CellCut, CellScores, HiddenLogits, TeacherBatch, distillation_loss
from xtoken_core.models import final_hidden, head_logits, load, load_model
from xtoken_core.partition import Partition
from xtoken_core.projection import Projection, build_projection
from xtoken_core.spec import DistillationSpec, LossSpec
from xtoken_core.teachers.scores import Scores
from xtoken_core.teachers.scoring import likeliest_cells, score_rows
from xtoken_core.tokenization import TokenTable, load_tokenizer
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.training.scored import scored_teachers
from xtoken_core.training.settings import training_loss
from xtoken_core.training.step import Clock, Teaching, begin_step
from xtoken_core.training.student import Student
from xtoken_core.training.teachers import ready_teachers
from xtoken_core.workflow.scoring import score_teacher

TEXT = Path(__file__).parents[2] / "pipelines" / "specs" / "demo_text" / "train.jsonl"
KD = LossSpec(mode="partition_kl", dynamic_scaling=False, ce_weight=0.0, kd_course="constant")
DEPTHS = (1, 4, 16, 64, 256)


def spec_of(models: Path, folder: Path, rows: int, scores: dict[str, Any] | None) -> DistillationSpec:
    """The run; `scores` of its teacher."""
    teacher = {"id": "gemma", "model": str(models / "gemma-3-270m"), "projection": {}} | (
        {} if scores is None else {"scores": scores}
    )
    values = {
        "name": "scores",
        "student": {"model": str(models / "smollm2-135m")},
        "teachers": [teacher],
        "loss": {"mode": "partition_kl"},
        "data": {"train": [str(TEXT)], "max_length": 256, "max_rows": rows},
        "training": {
            "max_steps": 1,
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "learning_rate": 1e-5,
            "precision": "fp32",
        },
        "output": {"uri": str(folder / "out")},
    }
    return DistillationSpec.from_text(json.dumps(values))


def made(spec: DistillationSpec, folder: Path) -> Projection:
    """Rows in `folder/rows`, W in `folder/w.safetensors`."""
    prepare_rows(spec, folder / "rows" / "train", "train")
    tokenizers = [load_tokenizer(ref) for ref in (spec.student.model, spec.teachers[0].model)]
    assert spec.teachers[0].projection is not None
    w = build_projection(*tokenizers, spec.teachers[0].projection)
    w.save(folder / "w.safetensors", *(TokenTable.from_tokenizer(t).fingerprint for t in tokenizers))
    return w


def listed_tokens(logits: Tensor, ids: Tensor, cells: Partition, k: int) -> CellScores:
    """What lists of k tokens would give: a cell's mass is that of its listed tokens, the masses of all others count together."""
    p = logits.float().softmax(-1)
    own = torch.nn.functional.pad(ids[:, 1:], (0, 1))
    top = torch.cat([own[..., None], p.scatter(2, own[..., None], 0).topk(k - 1).indices], -1)
    masses = torch.zeros(*ids.shape, cells.num_cells + 1)
    of = torch.where(cells.teacher < 0, cells.num_cells, cells.teacher)[top]
    masses.scatter_add_(2, of, p.gather(2, top))
    masses = masses[..., :-1]
    first = masses.scatter(2, of[..., :1].clamp(max=cells.num_cells - 1), math.inf)
    listed = first.topk(min(k, cells.num_cells)).indices
    known = masses.gather(2, listed)
    kept = 1 - p[..., cells.teacher < 0].sum(-1)
    rest = (kept - known.sum(-1)).clamp(min=2.0**-126).log()
    realised = p.gather(2, own[..., None])[..., 0].log()
    return CellScores(
        known.clamp(min=2.0**-126).log(), listed.int(), rest, kept.log(), realised, cells.num_cells, logits.shape[2]
    )


@torch.no_grad()
def batches(spec: DistillationSpec, folder: Path, w: Projection) -> Iterator[tuple[tuple[Any, ...], TeacherBatch, Tensor]]:
    """Of each row the student's side, the teacher's, and the teacher's logits."""
    models = [load_model(ref) for ref in (spec.student.model, spec.teachers[0].model)]
    rows, collate = load_rows(folder / "rows" / "train"), Collator.for_rows(spec, folder / "rows" / "train")
    assert w.cells is not None
    for i in range(len(rows)):
        batch = collate([rows[i]])
        side = batch.teachers[0]
        heads = [
            head_logits(model, final_hidden(model, ids), len(cells))
            for model, ids, cells in zip(models, (batch.student.input_ids, side.input_ids), (w.cells.student, w.cells.teacher))
        ]
        teacher = TeacherBatch(heads[1], side.input_ids, side.token_mask, projection=w, **vars(side.chunks))
        yield (heads[0], *batch.masks), teacher, heads[1].dense()


def by_k(spec: DistillationSpec, folder: Path, w: Projection) -> Iterator[dict[str, Any]]:
    """One line for each k: means over rows of the loss, the gradient's distance from the running teacher's, and the mass listed."""
    assert w.cells is not None
    found: dict[tuple[str, int], list[Tensor]] = {}
    for (form, *masks), teacher, logits in batches(spec, folder, w):

        def ask(asked: TeacherBatch, form: HiddenLogits = form, masks: Sequence[Tensor] = masks) -> tuple[float, Tensor]:
            hidden = form.hidden.clone().requires_grad_()
            loss = distillation_loss(replace(form, hidden=hidden), *masks, [asked], KD).loss
            return loss.item(), torch.autograd.grad(loss, hidden)[0].flatten()

        live, truth = ask(teacher)
        for k in DEPTHS:
            assert teacher.input_ids is not None
            exact = CellCut.of(w.cells, logits.shape[2], k, 1.0)(logits, teacher.input_ids)
            for kind, scores in (("cells", exact), ("tokens", listed_tokens(logits, teacher.input_ids, w.cells, k))):
                value, gradient = ask(replace(teacher, logits=scores))
                near = torch.cosine_similarity(gradient, truth, dim=0).item(), (gradient.norm() / truth.norm()).item()
                missed = scores.rest.exp().mean().item()
                found.setdefault((kind, k), []).append(torch.tensor([live, value, *near, missed]))
    for (kind, k), rows in found.items():
        live, value, cosine, norm, missed = torch.stack(rows).mean(0).tolist()
        yield {"case": "k", "of": kind, "k": k, "kd_live": live, "kd": value, "cosine": cosine, "norm": norm, "rest": missed}


def speed(models: Path, folder: Path, w: Projection, rows: int, steps: int) -> Iterator[dict[str, Any]]:
    """Lines `score` and `step`."""
    spec = spec_of(models, folder, rows, {"top_k": 64})
    tokens = score_teacher(spec, "gemma", folder / "rows", folder / "scores")
    size = sum(path.stat().st_size for path in (folder / "scores").iterdir())
    teacher, cells = load_model(spec.teachers[0].model), w.cells
    assert cells is not None
    settings, rows_of = Scores(folder / "scores").settings, load_rows(folder / "rows" / "train")
    ids = [torch.as_tensor(rows_of[i]["teacher_gemma_ids"]).long() for i in range(len(rows_of))]
    cut = likeliest_cells(CellCut.of(cells, settings.vocab_size, 64, 1.0))
    started = time.process_time()
    score_rows(teacher, ids, folder / "again", settings, cut)
    yield {
        "case": "score",
        "tokens": tokens,
        "tokens_per_cpu_second": tokens / (time.process_time() - started),
        "bytes_per_token": size / tokens,
    }
    inputs = TrainingInputs(
        (folder / "rows",), {"gemma": "partition_kl"}, {"gemma": folder / "w.safetensors"}, {"gemma": (folder / "scores",)}
    )
    loaded = load(spec.student.model, None, "student", torch.float32, "auto")
    ready = ready_teachers(spec, inputs, loaded, torch.device("cpu"))
    collators = {
        "ce": Collator.for_rows(spec, folder / "rows" / "train"),
        "scores": Collator.for_rows(spec, folder / "rows" / "train", scored_teachers(spec, inputs)),
    }
    teaching = {"ce": Teaching(), "scores": Teaching(ready)}
    student = {name: Student(loaded, training_loss(spec, name == "ce"), {}) for name in collators}
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-6)
    data = [row | {"shard": 0, "row": i} for i, row in enumerate(load_rows(folder / "rows" / "train"))]
    found: dict[str, list[float]] = {"ce": [], "scores": [], "teacher's forward": []}
    counted = 0
    for number in range(steps + 1):
        chosen = [data[i % len(data)] for i in range(2 * number, 2 * number + 2)]
        counted += sum(len(row["student_ids"]) for row in chosen) if number else 0
        for name, collate in collators.items():
            began = time.process_time()
            step = begin_step([collate(chosen)], teaching[name], student[name], 1.0, 1.0, Clock())
            student[name](step.micro_batches[0], step.totals)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            found[name].append(time.process_time() - began)
        began = time.process_time()
        with torch.no_grad():
            final_hidden(teacher, collators["ce"](chosen).teachers[0].input_ids)
        found["teacher's forward"].append(time.process_time() - began)
    alone = sum(found["ce"][1:])  # the first steps make tables
    for name, seconds in found.items():
        ratios = statistics.median(a / b for a, b in zip(seconds[1:], found["ce"][1:]))
        taken = sum(seconds[1:])
        yield {
            "case": "step",
            "of": name,
            "tokens_per_cpu_second": counted / taken,
            "seconds_to_ce": taken / alone,
            "median_to_ce": ratios,
        }


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", choices=("k", "speed"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        spec = spec_of(options.models.absolute(), folder, options.rows, None)
        w = made(spec, folder)
        if options.only != "k":
            for line in speed(options.models.absolute(), folder, w, options.rows, options.steps):
                print(json.dumps(line), flush=True)
        if options.only != "speed":
            for line in by_k(spec, folder, w):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
