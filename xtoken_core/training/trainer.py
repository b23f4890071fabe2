"""The trainer: transformers' own, fed a whole optimizer step at a time.

A step fetches all its micro-batches, runs the teachers over them one after another, decides counts, weights and scale
from sums over all ranks, and only then runs the student: micro-batch by micro-batch, each giving its share of one loss.
"""

from __future__ import annotations

import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from xtoken_core.costs import GIB
from xtoken_core.data.batch import Batch
from xtoken_core.data.reading import Shuffled
from xtoken_core.errors import NonFiniteError
from xtoken_core.models import save_model
from xtoken_core.results.training import LogLine
from xtoken_core.training.checkpoints import LEARNABLE_FILE, Progress, complete_checkpoint, newest_checkpoint
from xtoken_core.training.heard import hear
from xtoken_core.training.log import RunLog
from xtoken_core.training.ranks import Watch
from xtoken_core.training.saving import save_finished
from xtoken_core.training.sharding import between_micro_batches, configure
from xtoken_core.training.step import Clock, Step, StepResult, Teaching, all_finite, begin_step
from xtoken_core.training.student import Student
from xtoken_core.training.validation import HeldOut, validate


@dataclass(frozen=True)
class TrainingData:
    """The rows of a training."""

    collate: Callable[[Sequence[Any]], Batch]
    train: Any
    """Map-style rows; repeated and shuffled as often as needed."""
    validation: Any | None = None
    """Map-style rows; None: no validation."""
    domains: frozenset[str] = frozenset({""})
    """Of the parts of `train`; `` of one without a name."""


@dataclass(frozen=True)
class RunRecord:
    """Where a training leaves what it makes, and how far it is."""

    out_dir: Path
    """Gets `best`; checkpoints lie where transformers' settings say."""
    progress: Progress = field(default_factory=Progress)
    """Of the checkpoint to resume from, or fresh."""
    log: RunLog | None = None
    """The first rank's."""
    checkpoint_uri: str | None = None
    """Folder or URI where checkpoints are kept as well."""
    dtype: torch.dtype = torch.float32
    """Of the saved student's weights: its source's. Checkpoints keep what is trained, in float32."""
    skip_nonfinite: int = 0
    """Steps that may be skipped since their numbers are not finite."""
    watch: Watch = field(default_factory=lambda: Watch(0, 1, math.inf))
    """Is told where this rank is."""


class DistillationTrainer(Trainer):
    """transformers.Trainer with teachers; `model` is a `Student`."""

    def __init__(
        self,
        model: Student,
        args: TrainingArguments,
        data: TrainingData,
        teaching: Teaching,
        record: RunRecord,
        callbacks: Sequence[TrainerCallback],
    ):
        """Puts a run together; `args` are transformers' settings, `callbacks` trackers."""
        rows = args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size * args.world_size
        self.data, self.teaching, self.record = data, teaching, record
        self.train_rows = Shuffled(data.train, rows, args.seed)
        self.step: Step | None = None
        """The step under way."""
        self.result: StepResult | None = None
        """Of the last finished step."""
        super().__init__(
            model,
            args,
            data_collator=data.collate,  # type: ignore[arg-type]  # a Batch in place of a dict
            train_dataset=self.train_rows,
            eval_dataset=data.validation,
            callbacks=[_Steps(self), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        configure(self.accelerator, model)

    @property
    def student(self) -> Student:
        """The module itself, not DDP's wrapper of it."""
        return cast(Student, self.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_rows)  # shuffled already

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """All micro-batches of a step with their teachers' outputs and the step's totals."""
        clock = Clock()
        self._at("its data")
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self._at("the teachers")
        self.step = begin_step(batches, self.teaching, self.student, self.record.progress.scale, self._course(), clock)
        return [{"micro_batch": m, "totals": self.step.totals} for m in self.step.micro_batches], 1

    def _at(self, place: str) -> None:
        self.record.watch.at(f"step {self.state.global_step + 1}, {place}")

    def _course(self) -> float:
        """What is left of KD's factor in the step that begins."""
        return 1.0 if self.student.loss.kd_course == "constant" else 1.0 - self.state.global_step / self.args.max_steps

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the global loss, times the ranks, since DDP and FSDP average gradients over them."""
        assert self.step is not None
        self._at("the student's forward pass")
        self.teaching.check()
        between_micro_batches(model, self.accelerator)
        out = model(**inputs)
        self._at("its backward pass")
        self.step.add(out["sums"])
        return out["loss"] * self.args.world_size

    def check_step(self) -> None:
        """Before the optimizer's step: one whose numbers are not finite is skipped, or ends the run. Raises NonFiniteError."""
        assert self.step is not None
        if all_finite([self.step.sums, *(p.grad for p in self.student.parameters())], self.args.device):
            return
        number, fault, progress = self.state.global_step + 1, self.step.fault(), self.record.progress
        progress.skipped += 1
        if progress.skipped > self.record.skip_nonfinite:
            raise self._not_finite(number, fault)
        if self.record.log is not None:
            self.record.log.say(f"step {number}: skipped ({progress.skipped} of {self.record.skip_nonfinite}), {fault}")
        self.step.skipped = True
        for parameter in self.student.parameters():  # the optimizer passes over those without a gradient
            parameter.grad = None

    def _not_finite(self, step: int, fault: str) -> NonFiniteError:
        return NonFiniteError(f"step {step}: {fault}; last good checkpoint: {newest_checkpoint(Path(str(self.args.output_dir)))}")

    def finish_step(self) -> None:
        """After the optimizer's step: the sums of all ranks become metrics and the next step's scale."""
        assert self.step is not None
        self.teaching.release()
        step, self.step = self.step, None
        self.result, progress = step.finish(self.student.loss), self.record.progress
        if self.teaching.teachers and not step.skipped:
            progress.scale = self.result.scale
        progress.tokens += self.result.tokens
        for phase, seconds in self.result.seconds.items():
            progress.seconds[phase] += seconds

    def _memory(self) -> int:
        """Bytes in use: of the GPU, by all processes; on a CPU, the peaks of this process and its teachers, what they share counted once."""
        if self.args.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            return total - free
        teachers = self.teaching.pool.teachers if self.teaching.pool else []
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return own + sum(teacher.info["host_bytes"] - teacher.shared_bytes for teacher in teachers)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' optimizer; learnable projections are a group of their own, without decay."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            for teacher in self.teaching.teachers:
                if teacher.learnable is None:
                    continue
                weights = teacher.learnable.log_weights
                for group in optimizer.param_groups:
                    group["params"] = [p for p in group["params"] if p is not weights]
                optimizer.add_param_group({"params": [weights], "lr": teacher.learning_rate, "weight_decay": 0.0})
        return cast(torch.optim.Optimizer, self.optimizer)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measures the student on the validation rows. Saves a new best student to `best`."""
        started = time.monotonic()
        args, record, step = self.args, self.record, self.state.global_step
        record.watch.at(f"the validation after step {step}")
        self.student.eval()
        held_out = HeldOut.of(self.data.validation, self.data.domains, self.data.collate, args)
        found = validate(self.student, held_out, args.device)
        value = record.progress.last_bits_per_byte = found.bits_per_byte
        if not math.isfinite(value):
            raise self._not_finite(step, "student: its validation is not finite")
        metrics = {"validation_bits_per_byte": value, "validation_accuracy": found.accuracy}
        changes = hear(self.teaching, record.progress, found.domains, held_out, step, args)
        if record.log is not None:
            record.log.write(LogLine(step=step, **metrics, validation_domains=found.named, silent=record.progress.silent))
            for line in (f"validation {value:.4f} bits per byte", *changes):
                record.log.say(f"step {step}  {line}")
        super().log({f"eval_{name}": v for name, v in metrics.items()})
        record.progress.seconds["validation"] += time.monotonic() - started
        best = record.progress.best_bits_per_byte
        if step > 0 and (best is None or value < best):
            record.progress.best_step, record.progress.best_bits_per_byte = step, value
            self.save_student(record.out_dir / "best")
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's line in log.jsonl, and the same numbers to the trackers."""
        if "grad_norm" in logs and self.result is not None:  # transformers' line of a step
            own = {"tokens": self.record.progress.tokens, "memory_gib": self._memory() / GIB}
            rates = {"learning_rate": logs["learning_rate"], "grad_norm": logs["grad_norm"]}
            line = LogLine(step=self.state.global_step, **self.result.metrics, **own, **rates)
            if self.record.log is not None:
                self.record.log.step(line)
            logs = line.flat()
        super().log(logs, start_time)

    def save_student(self, folder: Path) -> None:
        """Saves the student so that it appears in `folder` whole or not at all. All ranks call it. Raises NonFiniteError."""
        started = time.monotonic()
        self.record.watch.at(f"saving {folder.name}")
        self._check_weights()
        partial = folder.with_name(f"{folder.name}.partial")
        state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None  # gathered from the shards
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            student = self._unwrapped()
            weights = None if state is None else student.model_weights(state)
            save_finished(student.model, student.tokenizer, partial, self.record.dtype, weights)
            self._save_learned(partial, student.state_dict() if state is None else state)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        self.record.progress.seconds["save"] += time.monotonic() - started

    def _check_weights(self) -> None:
        if not all_finite((p.detach() for p in self.student.parameters()), self.args.device):
            raise self._not_finite(self.state.global_step, "student: its weights are not finite")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        assert output_dir is not None
        folder = Path(output_dir)
        student = self._unwrapped()
        weights = None if state_dict is None else student.model_weights(state_dict)  # gathered from the shards
        save_model(student.model, student.tokenizer, folder, weights)
        learned = self._save_learned(folder, student.state_dict() if state_dict is None else state_dict)
        if learned:
            save_file(learned, folder / LEARNABLE_FILE)

    def _unwrapped(self) -> Student:
        return cast(Student, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _save_learned(self, folder: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Saves each trained W to `folder` as a Projection; their weights by teacher id."""
        student = self._unwrapped()
        learned = student.learned_weights(state)
        for teacher in self.teaching.teachers:
            if teacher.id in learned:
                teacher.save_learned(folder, student.table, learned[teacher.id])
        return learned

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        started = time.monotonic()
        self.record.watch.at(f"saving the checkpoint of step {self.state.global_step}")
        self._check_weights()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            self.record.progress.seconds["save"] += time.monotonic() - started
            complete_checkpoint(folder, self.record.out_dir, self.record.progress, self.record.checkpoint_uri)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The student was made from the checkpoint in the first place."""


class _Steps(TrainerCallback):
    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.check_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.finish_step()
