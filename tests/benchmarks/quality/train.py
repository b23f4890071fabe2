"""One worker of the lab, on one device: takes arms from a plan until none is left, and writes a JSON line for each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.benchmarks.quality.arms import Arm, Job, Setting
from tests.benchmarks.quality.rows import Rows, orders
from tests.benchmarks.quality.teachers import CachedTeacher, cached_teacher, feed
from xtoken_core.evaluation.harness import run_tasks
from xtoken_core.layers import prune_layers
from xtoken_core.losses import (
    StepTotals,
    StudentBatch,
    batch_counts,
    distillation_loss,
    dynamic_scale,
    loss_metrics,
    loss_sums,
)
from xtoken_core.models import final_hidden, head_logits, load_model
from xtoken_core.spec import EvaluationSpec
from xtoken_core.tokenization import load_tokenizer

WARMUP = 20
SETTLED = 20
"""Steps after which speed is measured: kernels are compiled by then."""


@dataclass
class Bench:
    """What a worker keeps of a setting between arms."""

    setting: Setting
    device: torch.device
    shared: Path
    model: PreTrainedModel
    start: dict[str, Tensor]
    """The student's first weights."""
    forward: Callable[..., Any]
    """The base model, compiled."""
    rows: Rows
    held_out: dict[str, Rows]
    teachers: dict[int, CachedTeacher]

    @classmethod
    def open(cls, setting: Setting, device: torch.device, shared: Path) -> Bench:
        """Loads student and rows; teachers come when an arm asks for one."""
        model = load_model(setting.student)
        if setting.keep_layers is not None:
            prune_layers(model, setting.keep_layers)
        model = model.to(device).train()
        start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        load = Rows.as_teacher if setting.as_teacher else Rows.load
        rows, *held_out = (load(Path(setting.data) / f"{name}.npz", device) for name in ("train", *setting.held_out))
        forward = torch.compile(model.base_model, dynamic=False) if device.type == "cuda" else model.base_model
        return cls(setting, device, shared, model, start, forward, rows, dict(zip(setting.held_out, held_out)), {})

    def serves(self, setting: Setting) -> bool:
        """Whether the arms of a setting can train here: it differs in how many rows are read, and how, at most."""
        return replace(setting, name=self.setting.name, rows=self.setting.rows, rate=self.setting.rate) == self.setting

    def teacher(self, number: int, count: int) -> CachedTeacher:
        """A teacher with hidden states over the first `count` rows, loaded when they are first asked for."""
        if number not in self.teachers or self.teachers[number].count < count:
            self.teachers[number] = cached_teacher(self.setting, number, self.rows, count, self.shared, self.device)
        return self.teachers[number]

    def hidden(self, ids: Tensor, forward: Callable[..., Any] | None = None) -> Tensor:
        """The student's final hidden states, in bf16 on a GPU, as the trainer has them."""
        cuda = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=cuda):
            found = (
                final_hidden(self.model, ids) if forward is None else forward(input_ids=ids, use_cache=False).last_hidden_state
            )
        return found.to(torch.bfloat16) if cuda else found

    def bits_per_byte(self, name: str) -> float:
        """Of a held-out text."""
        return bits_per_byte(self.model, self.hidden, self.held_out[name], self.vocabulary, 64)

    def silent(self, arm: Arm) -> set[int]:
        """Numbers of the teachers that are too little ahead on held-out text of their domains."""
        if arm.until is None or arm.domains is None:
            return set()
        names, teachers = list(self.held_out), zip(arm.domains, arm.until, strict=True)
        return {n for n, (d, bits) in enumerate(teachers) if d is not None and self.bits_per_byte(names[d]) < bits}

    @property
    def vocabulary(self) -> int:
        """Columns of the student's logits."""
        return self.setting.vocabulary or int(self.model.config.get_text_config().vocab_size)


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel, hidden: Callable[[Tensor], Tensor], rows: Rows, vocabulary: int, batch_size: int
) -> float:
    """Of held-out rows. hidden: from ids [n, T] to the model's final hidden states; vocabulary: columns of its logits."""
    spec, nats, size = Arm("ce").spec(), 0.0, 0
    for index in torch.arange(len(rows), device=rows.arrays["input_ids"].device).split(batch_size):
        batch = rows.student(index)
        masks = batch["input_ids"], batch["token_mask"], batch["sample_mask"]
        totals = StepTotals.from_sums(batch_counts(*masks, [], spec), [], spec, scale=1.0)
        logits = head_logits(model, hidden(batch["input_ids"]), vocabulary)
        nats += float(loss_sums(StudentBatch.of(logits, *masks), [], spec, totals)[0])
        size += int((batch["token_bytes"] * batch["token_mask"])[:, 1:].sum())
    return nats / math.log(2) / size


def train(bench: Bench, setting: Setting, job: Job) -> dict[str, Any]:
    """Trains an arm from the student's first weights; what it came to."""
    arm, device = job.arm, bench.device
    bench.model.load_state_dict(bench.start)
    spec = arm.spec()
    rate = setting.rate if job.rate is None else job.rate
    optimizer = torch.optim.AdamW(bench.model.parameters(), lr=rate, weight_decay=0.0, fused=device.type == "cuda")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, job.steps))
    rows, batch_size = setting.rows if job.rows is None else job.rows, job.batch or setting.batch
    chosen = {n: bench.teacher(n, rows).of(arm) for n in arm.heard(setting)}
    scale: Tensor | None = None
    losses: list[dict[str, float]] = []
    main, *others = bench.held_out
    curve, silent = [(0, bench.bits_per_byte(main))], bench.silent(arm)
    settled = time.monotonic()
    for step, (index, hidden) in enumerate(feed(chosen, orders(rows, job.steps, batch_size, job.seed), device)):
        if step == min(SETTLED, job.steps - 1):
            _wait(device)
            settled = time.monotonic()
        batch = bench.rows.student(index)
        masks = batch["input_ids"], batch["token_mask"], batch["sample_mask"]
        teachers = [t.batch(bench.rows, index, hidden[n], arm, n in silent) for n, t in chosen.items()]
        totals = StepTotals.from_sums(batch_counts(*masks, teachers, spec), teachers, spec, scale=scale)
        totals = replace(totals, course=ratio_at(arm, step, job.steps))
        logits = head_logits(bench.model, bench.hidden(batch["input_ids"], bench.forward), bench.vocabulary)
        if spec.dynamic_scaling and scale is None:
            totals = totals.with_scale(1.0)
            own = loss_sums(StudentBatch.of(logits, *masks), teachers, spec, totals)
            totals = totals.with_scale(dynamic_scale(own, totals, spec))
        out = distillation_loss(logits, *masks, teachers, spec, totals=totals)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(bench.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        scale = dynamic_scale(out.sums, totals, spec)
        if step % 20 == 0:
            metrics = loss_metrics(out.sums, totals, spec).items()
            losses.append({"step": step, **{k: round(float(v), 5) for k, v in metrics if "loss" in k}})
        if (step + 1) % min(50, max(1, job.steps // 8)) == 0 and step + 1 < job.steps:
            _wait(device)
            paused = time.monotonic()
            curve.append((step + 1, bench.bits_per_byte(main)))
            silent = bench.silent(arm)
            settled += time.monotonic() - paused
    _wait(device)
    seconds = time.monotonic() - settled
    curve.append((job.steps, bench.bits_per_byte(main)))
    if job.save is not None:
        _save(bench.model, Path(job.save))
    per_second = (job.steps - min(SETTLED, job.steps - 1)) / seconds
    return {
        "key": job.key, "job": asdict(job), "held_out": {main: curve[-1][1], **{name: bench.bits_per_byte(name) for name in others}},
        "tasks": _asked(bench.model, setting), "curve": curve, "losses": losses, "tokens_per_second": per_second * batch_size * masks[0].shape[1],
        "steps_per_second": per_second, "teacher_tokens_per_second": [t.tokens_per_second for t in chosen.values()],
        "device": _name(device),
    }  # fmt: skip


def _asked(model: PreTrainedModel, setting: Setting) -> dict[str, float | None]:
    """The share of right answers of each of the setting's tasks."""
    if not setting.tasks:
        return {}
    tokenizer = load_tokenizer(setting.teachers[0].model if setting.as_teacher else setting.student)
    found = run_tasks(EvaluationSpec(tasks=setting.tasks), model.eval(), tokenizer, None)
    model.train()
    return {name: score.value for name, score in found.items()}


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Writes the model in bf16; the folder is there when it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(part, state_dict=state)
    part.rename(folder)


def learning_rate(step: int, steps: int) -> float:
    """What is left of the rate at a step: warm-up, then half a cosine."""
    warm = min(WARMUP, steps // 2)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def ratio_at(arm: Arm, step: int, steps: int) -> float:
    """KD as a share of CE at a step."""
    place = (len(arm.ratio) - 1) * step / max(1, steps - 1)
    before = min(int(place), len(arm.ratio) - 1)
    after = min(before + 1, len(arm.ratio) - 1)
    return arm.ratio[before] + (arm.ratio[after] - arm.ratio[before]) * (place - before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
