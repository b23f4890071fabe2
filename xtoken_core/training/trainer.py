"""The trainer: transformers' own, fed a whole optimizer step at a time.

A step fetches all its micro-batches, runs the teachers over them one after another, decides counts, weights and scale
from sums over all ranks, and only then runs the student: micro-batch by micro-batch, each giving its share of one loss.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from xtoken_core.data.reading import Shuffled
from xtoken_core.losses import StepTotals, TeacherBatch, batch_counts, dynamic_scale, loss_metrics
from xtoken_core.models import save_model
from xtoken_core.teachers.pool import GIB, TeacherPool
from xtoken_core.training.checkpoints import LEARNABLE_FILE, STATE_FILE, Progress
from xtoken_core.training.log import RunLog
from xtoken_core.training.student import Batch, MicroBatch, Student, teacher_batch, teacher_inputs


class DistillationTrainer(Trainer):
    """transformers.Trainer with teachers; `model` is a `Student`."""

    def __init__(
        self,
        model: Student,
        args: TrainingArguments,
        *,
        collate: Callable[[Sequence[Any]], Batch],
        train_rows: Any,
        validation_rows: Any | None,
        tokenizer: PreTrainedTokenizerBase,
        pool: TeacherPool | None,
        templates: Sequence[TeacherBatch],
        teacher_ids: Sequence[str],
        projection_rates: dict[int, float],
        out_dir: Path,
        progress: Progress,
        log: RunLog | None,
        save_projections: Callable[[Path, dict[int, Tensor]], None],
        publish_checkpoint: Callable[[Path], None],
        callbacks: list[TrainerCallback],
    ):
        """Puts a run together.

        Args:
            model: the student with its loss.
            args: transformers' settings.
            collate: rows -> micro-batch.
            train_rows: map-style, repeated and shuffled as often as needed.
            validation_rows: map-style; None: no validation.
            tokenizer: the student's, saved with it.
            pool: running teachers; None: cross-entropy alone.
            templates: what is the same in every TeacherBatch of each teacher; on the device.
            teacher_ids: their names in logs.
            projection_rates: learning rate of each learnable projection by teacher index.
            out_dir: where `best` goes.
            progress: of the checkpoint to resume from, or fresh.
            log: the first rank's.
            save_projections: saves learned projections to a folder, given their log-weights by teacher index.
            publish_checkpoint: called on the first rank with each complete checkpoint's folder.
            callbacks: trackers.
        """
        rows = args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size * args.world_size
        self.pool, self.templates, self.teacher_ids = pool, list(templates), list(teacher_ids)
        self.out_dir, self.progress, self.run_log = out_dir, progress, log
        self.save_projections, self.publish_checkpoint = save_projections, publish_checkpoint
        self.collate, self.tokenizer, self.projection_rates = collate, tokenizer, projection_rates
        self.train_rows, self.validation_rows = Shuffled(train_rows, rows, args.seed), validation_rows
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=self.train_rows,
            eval_dataset=validation_rows,
            callbacks=[_StepEnd(self), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.loss_spec = model.loss

    # ------------------------------------------------------------------------------------------- one optimizer step

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_rows)  # shuffled already

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """All micro-batches of a step with their teachers' outputs and the step's totals."""
        self._started = time.monotonic()
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        fetched = time.monotonic()
        micro_batches, counts = self._teach(batches)
        totals = StepTotals.from_sums(
            self._reduce(counts), micro_batches[0].teachers, self.loss_spec, scale=self.progress.scale if self.templates else 1.0
        )
        taught = time.monotonic()
        if self.loss_spec.dynamic_scaling and totals.scale is None:  # the first step: its own sums, before its gradients
            with torch.no_grad():
                sums = [self.student(m, totals, with_loss=False)["sums"] for m in micro_batches]
            totals = totals.with_scale(dynamic_scale(self._reduce(torch.stack(sums).sum(0)), totals, self.loss_spec))
        self._totals, self._sums = totals, torch.zeros(0)
        self._tokens = torch.stack([batch["attention_mask"].sum() for batch in batches]).sum()
        self._seconds = {"data": fetched - self._started, "teachers": taught - fetched}
        return [{"micro_batch": m, "totals": totals} for m in micro_batches], 1

    def _teach(self, batches: list[Batch]) -> tuple[list[MicroBatch], Tensor]:
        """Runs the teachers; micro-batches with their outputs, and the step's `batch_counts` on this rank."""
        runs = []
        if self.pool is not None:
            scored = [t.setup.scores is not None for t in self.pool.teachers]
            runs = self.pool.run([teacher_inputs(batches, i, with_scores) for i, with_scores in enumerate(scored)])
        self._teacher_seconds = [run.seconds for run in runs]
        micro_batches, counts = [], []
        for n, batch in enumerate(batches):
            teachers = [teacher_batch(t, run.logits[n], batch, i) for i, (t, run) in enumerate(zip(self.templates, runs))]
            scores = [torch.tensor(run.scores[n] if run.scores else [0.0, 0.0], dtype=torch.float64) for run in runs]
            masks = batch["input_ids"], batch["token_mask"], batch["sample_mask"]
            counts.append(batch_counts(*masks, teachers, self.loss_spec, scores))
            micro_batches.append(MicroBatch(batch, teachers))
        return micro_batches, torch.stack(counts).sum(0)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the global loss, times the ranks, since DDP and FSDP average gradients over them."""
        if self.pool is not None:
            self.pool.check()
        out = model(**inputs)
        self._sums = out["sums"] if not len(self._sums) else self._sums + out["sums"]
        return out["loss"] * self.args.world_size

    def finish_step(self) -> None:
        """After the optimizer's step: the sums of all ranks become metrics and the next step's scale."""
        if self.pool is not None:
            self.pool.release()
        reduced = self._reduce(torch.cat([self._sums, self._tokens.double()[None]]))
        sums, tokens = reduced[:-1], int(reduced[-1])
        metrics = {k: float(v) for k, v in loss_metrics(sums, self._totals, self.loss_spec).items()}
        if self.templates:
            self.progress.scale = float(dynamic_scale(sums, self._totals, self.loss_spec))
        self.progress.tokens += tokens
        seconds = time.monotonic() - self._started
        self._seconds["student"] = seconds - sum(self._seconds.values())
        for phase, value in self._seconds.items():
            self.progress.seconds[phase] += value
        self.step_metrics = {
            "loss": metrics["loss"],
            "ce": metrics["ce_loss"],
            "kd": metrics["kl_loss"],
            **_per_teacher(metrics, self.teacher_ids),
            "scale": metrics["kl_loss_scale"],
            "accuracy": metrics["accuracy"],
            "tokens": self.progress.tokens,
            "tokens_per_second": tokens / seconds,
            "seconds_step": seconds,
            "seconds_data": self._seconds["data"],
            "seconds_teachers": self._seconds["teachers"],
            **{f"seconds_{name}": value for name, value in zip(self.teacher_ids, self._teacher_seconds)},
            "memory_gib": self._memory() / GIB,
        }

    def _reduce(self, sums: Tensor) -> Tensor:
        """Sums over the data-parallel ranks."""
        sums = sums.to(self.args.device)
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        return sums

    def _memory(self) -> int:
        """Bytes in use: of the GPU, by all processes; on a CPU, the peaks of this process and its teachers, what they share counted once."""
        if self.args.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            return total - free
        teachers = self.pool.teachers if self.pool else []
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return own + sum(teacher.info["host_bytes"] - teacher.shared_bytes for teacher in teachers)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' optimizer; learnable projections are a group of their own, without decay."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            for index, projection in self.student.learnable.items():
                weights, rate = projection.log_weights, self.projection_rates[int(index)]
                for group in optimizer.param_groups:
                    group["params"] = [p for p in group["params"] if p is not weights]
                optimizer.add_param_group({"params": [weights], "lr": rate, "weight_decay": 0.0})
        return cast(torch.optim.Optimizer, self.optimizer)

    @property
    def student(self) -> Student:
        """The module itself, not DDP's wrapper of it."""
        return cast(Student, self.model)

    # -------------------------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Bits per byte of the validation rows: CE of their targets over the targets' bytes. Saves a new best student to `best`."""
        started = time.monotonic()
        self.student.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        for batch in self._validation_batches():
            counts = batch_counts(batch["input_ids"], batch["token_mask"], batch["sample_mask"], [], self.loss_spec)
            totals = StepTotals.from_sums(counts, [], self.loss_spec)
            out = self.student(MicroBatch(batch, []), totals, with_loss=False)
            targets = batch["token_mask"].bool() & batch["sample_mask"].bool()[:, None]
            num_bytes = (batch["token_bytes"] * targets)[:, 1:].sum().double()
            sums += torch.cat([out["sums"], counts[:1], num_bytes[None]])
        ce, correct, tokens, num_bytes = self._reduce(sums).tolist()
        value = ce / math.log(2) / num_bytes
        metrics = {"validation_bits_per_byte": value, "validation_accuracy": correct / tokens}
        self.progress.last_bits_per_byte = value
        if self.run_log is not None:
            self.run_log.write({"step": self.state.global_step, **metrics})
            self.run_log.say(f"step {self.state.global_step}  validation {value:.4f} bits per byte")
        super().log({f"eval_{name}": v for name, v in metrics.items()})
        self.progress.seconds["validation"] += time.monotonic() - started
        best = self.progress.best_bits_per_byte
        if self.state.global_step > 0 and (best is None or value < best):
            self.progress.best_step, self.progress.best_bits_per_byte = self.state.global_step, value
            self.save_student(self.out_dir / "best")
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_batches(self) -> Iterator[Batch]:
        """This rank's share; every rank gets as many, since FSDP's forward is collective: some may be masked out."""
        assert self.validation_rows is not None
        rows, size, ranks = self.validation_rows, self.args.per_device_train_batch_size, self.args.world_size
        count = math.ceil(len(rows) / size)
        for n in range(self.args.process_index, math.ceil(count / ranks) * ranks, ranks):
            first = min(n, count - 1) * size
            batch = self.collate([rows[i] for i in range(first, min(first + size, len(rows)))])
            if n >= count:
                batch["sample_mask"].zero_()
            yield self._prepare_inputs({**batch, "teachers": []})

    # ------------------------------------------------------------------------------------------- logs, checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's line in log.jsonl, and the same numbers to the trackers."""
        if "learning_rate" in logs:
            logs = {**self.step_metrics, "learning_rate": logs["learning_rate"], "grad_norm": logs["grad_norm"]}
            if self.run_log is not None:
                self.run_log.step({"step": self.state.global_step, **logs})
        numbers = {name: value for name, value in logs.items() if not isinstance(value, str)}  # trackers take nothing else
        super().log(numbers, start_time)

    def save_student(self, folder: Path) -> None:
        """Saves the student so that it appears in `folder` whole or not at all. All ranks call it."""
        started = time.monotonic()
        partial = folder.with_name(f"{folder.name}.partial")
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.save_model(str(partial), _internal_call=True)
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        self.progress.seconds["save"] += time.monotonic() - started

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        assert output_dir is not None
        student: Student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        whole = student.state_dict() if state_dict is None else state_dict
        weights = None
        if state_dict is not None:  # gathered from the shards
            weights = {name.removeprefix("model."): t for name, t in whole.items() if name.startswith("model.")}
        save_model(student.model, self.tokenizer, Path(output_dir), weights)
        learned = {int(index): whole[f"learnable.{index}.log_weights"].cpu() for index in student.learnable}
        self.save_projections(Path(output_dir), learned)
        if learned:
            save_file({str(index): t.contiguous() for index, t in learned.items()}, Path(output_dir) / LEARNABLE_FILE)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        started = time.monotonic()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            best, log = self.out_dir / "best", self.out_dir / "log.jsonl"
            if best.exists():  # with the checkpoint, in case the run goes on elsewhere
                shutil.rmtree(folder / "best", ignore_errors=True)  # of a run that was killed while it saved
                shutil.copytree(best, folder / "best", copy_function=os.link)
            shutil.copy(log, folder / log.name)
            self.progress.seconds["save"] += time.monotonic() - started
            partial = folder / f"{STATE_FILE}.partial"  # so that the file is there whole or not at all
            partial.write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
            partial.rename(folder / STATE_FILE)
            self.publish_checkpoint(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The student was made from the checkpoint in the first place."""


class _StepEnd(TrainerCallback):
    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.finish_step()


def _per_teacher(metrics: dict[str, float], ids: Sequence[str]) -> dict[str, Any]:
    """The metrics of teachers under their names instead of their numbers."""
    named: dict[str, Any] = {}
    for i, name in enumerate(ids):
        for ours, theirs in (("kd", "kl_loss"), ("weight", "weight"), ("chunks", "num_valid_chunks")):
            if f"{theirs}_t{i}" in metrics:
                named[f"{ours}_{name}"] = metrics[f"{theirs}_t{i}"]
    if "selected_teacher" in metrics:
        named["selected"] = ids[int(metrics["selected_teacher"])]
    return named
