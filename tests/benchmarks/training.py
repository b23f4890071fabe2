"""Speed and memory of training, end to end: `python -m tests.benchmarks.training --device cuda|cpu [--cases qwen_llama ...] [--steps 3] [--rows 32] [--micro-batch 4] [--mode partition_kl]
[--gpus 4 --sharding ddp|fsdp]`.

Random weights in the real shapes, made on the spot: a Llama-3.2-1B student, teachers of the sizes of Qwen3-4B and Llama-3.2-3B, or of
Phi-4-mini and Llama-3.2-3B, rows of 2048 tokens, bf16. The whole of it runs: trainer, teacher processes, losses,
AdamW. `--rows` are the rows of an optimizer step. Made-up W and chunks (`tests.benchmarks.loss`). `phi_compile` has one teacher; `lora_7b` trains
adapters of a student of 7.6 B under a teacher of 6.7 B, rows of 4096; `long` is one row of 32,768 tokens under a teacher of 4 B.

One JSON line per case, over the steps after the second (in the first two, kernels compile and teachers settle): tokens/s; seconds a step
and their split into teachers (their processes' own time), hand-over (the rest of the time until the student can begin), student (of it
`loss`), data; the first step (of it with teachers), and from the start of loading to its end; peak of the GPU's memory over all processes; the step's share of the floor (all matrix products at the rate of a
large one, measured in the same run). The last line is a summary. On `cpu` shapes are toys.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging

import xtoken_core.training.student
from tests.benchmarks.loss import chunk_ids, made_up_projection, rates
from xtoken_core.costs import GIB
from xtoken_core.data.batch import Collator
from xtoken_core.forking import start_server
from xtoken_core.models import Loaded
from xtoken_core.spec import DistillationSpec
from xtoken_core.spec.student import LoraSpec
from xtoken_core.teachers.handle import TEACHERS_IMPORT
from xtoken_core.teachers.pool import TeacherPool
from xtoken_core.teachers.setup import Shards, TeacherSetup
from xtoken_core.training.adapters import add_adapters
from xtoken_core.training.launch import on_every_gpu
from xtoken_core.training.log import RunLog
from xtoken_core.training.settings import training_arguments
from xtoken_core.training.step import Teaching
from xtoken_core.training.student import Student, prepare_student
from xtoken_core.training.teachers import ReadyTeacher
from xtoken_core.training.trainer import DistillationTrainer, RunRecord, TrainingData

_HEADS = {"num_key_value_heads": 8, "tie_word_embeddings": True, "max_position_embeddings": 4096}
LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    head_dim=64,
    **_HEADS,
)
LLAMA_3B = LlamaConfig(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    head_dim=128,
    **_HEADS,
)
QWEN_4B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    head_dim=128,
    **_HEADS,
)
PHI_4_MINI = Phi3Config(
    vocab_size=200064,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=24,
    pad_token_id=0,
    **_HEADS,
)
QWEN_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
_TOY = {**_HEADS, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
TOY_STUDENT, TOY_TEACHER = (LlamaConfig(vocab_size=v, num_hidden_layers=n, **_TOY) for v, n in ((8000, 2), (12000, 3)))


@dataclass(frozen=True)
class Case:
    """One line of the benchmark."""

    name: str
    student: PretrainedConfig
    teachers: tuple[PretrainedConfig, ...]
    length: int = 2048
    residency: str = "auto"
    compile: bool = False
    fp8: bool = False
    """Whether teachers' products are formed in 8 bits."""
    lora: int | None = None
    """Rank of adapters that are trained in place of all weights."""
    checkpointing: bool = False


CASES = {
    "cuda": [
        Case("qwen_llama", LLAMA_1B, (QWEN_4B, LLAMA_3B)),
        Case("phi_llama", LLAMA_1B, (PHI_4_MINI, LLAMA_3B)),
        Case("phi_llama_compile", LLAMA_1B, (PHI_4_MINI, LLAMA_3B), compile=True),
        Case("phi_llama_fp8", LLAMA_1B, (PHI_4_MINI, LLAMA_3B), compile=True, fp8=True),
        Case("qwen_llama_offload", LLAMA_1B, (QWEN_4B, LLAMA_3B), residency="offload"),
        Case("qwen_llama_compile", LLAMA_1B, (QWEN_4B, LLAMA_3B), compile=True),
        Case("phi_compile", LLAMA_1B, (PHI_4_MINI,), compile=True),
        Case("lora_7b", QWEN_7B, (LLAMA_7B,), length=4096, lora=16, checkpointing=True),
        Case("long", LLAMA_1B, (QWEN_4B,), length=32768, checkpointing=True),
    ],
    "cpu": [
        Case("toy", TOY_STUDENT, (TOY_TEACHER, TOY_STUDENT), length=128),
        Case("toy_fp8", TOY_STUDENT, (TOY_TEACHER, TOY_STUDENT), length=128, fp8=True),
        Case("toy_compile", TOY_STUDENT, (TOY_TEACHER,), length=128, compile=True),
        Case("toy_lora", TOY_STUDENT, (TOY_TEACHER,), length=128, lora=4, checkpointing=True),
    ],
}


@dataclass(frozen=True)
class Run:
    """How a case is run."""

    steps: int
    """Measured, after two others."""
    rows: int
    """Of an optimizer step, over all GPUs."""
    micro_batch: int = 1
    mode: str = "p_kl"
    """Of teachers with another vocabulary."""
    sharding: str = "ddp"
    address: str | None = None
    """Where the teachers of all ranks meet, if they are to be sharded."""


def spec_of(case: Case, run: Run) -> DistillationSpec:
    """The case as a spec; a teacher with the student's vocabulary size has its vocabulary."""
    teachers: list[dict[str, Any]] = [
        {"id": f"t{i}", "model": "made-up", "residency": case.residency} for i in range(len(case.teachers))
    ]
    for teacher, config in zip(teachers, case.teachers):
        if config.vocab_size != case.student.vocab_size:
            teacher["projection"] = {}
    return DistillationSpec.model_validate({
        "name": "benchmark", "student": {"model": "made-up"}, "teachers": teachers, "loss": {"mode": run.mode},
        "data": {"train": ["made-up"], "max_length": case.length}, "output": {"uri": "none"},
        "training": {
            "max_steps": run.steps + 2, "global_batch_size": run.rows, "micro_batch_size": run.micro_batch, "compile": case.compile,
            "sharding": run.sharding, "activation_checkpointing": case.checkpointing, "report_to": [],
        },
    })  # fmt: skip


def made_up_rows(case: Case, spec: DistillationSpec, count: int) -> list[dict[str, np.ndarray]]:
    """Rows as `prepare_rows` makes them, of random tokens."""
    g, length = np.random.default_rng(0), case.length

    def side(name: str, tokens: int, vocab: int) -> dict[str, np.ndarray]:
        ids = g.integers(0, vocab, tokens, dtype=np.int32)
        return {f"{name}_ids": ids, f"{name}_mask": np.ones(tokens, np.uint8), f"{name}_bytes": np.full(tokens, 4, np.uint16)}

    rows = []
    for _ in range(count):
        row = side("student", length, case.student.vocab_size)
        for i, config in enumerate(case.teachers):
            name = f"teacher_{spec.teachers[i].id}"
            if spec.teachers[i].cross_tokenizer:
                mine, theirs, chunks = chunk_ids(length, length - length // 64)
                row |= side(name, theirs.shape[1], config.vocab_size)
                row |= {f"{name}_student_chunk_id": mine[0].numpy(), f"{name}_teacher_chunk_id": theirs[0].numpy()}
                row[f"{name}_chunk_exact"] = np.ones(chunks, bool)
        rows.append(row)
    return rows


def model_folder(work: Path, config: PretrainedConfig) -> Path:
    """Where a teacher of this shape lies."""
    return work / f"{config.model_type}-{config.hidden_size}-{config.num_hidden_layers}"


def save_random(config: PretrainedConfig, folder: Path, device: torch.device) -> str:
    """A model of this shape with random bf16 weights, on disk."""
    if not folder.exists():
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return str(folder)


def flops_per_token(case: Case) -> float:
    """Matrix products of a step per student token: 6 per weight of the student, 2 per weight of a teacher, attention left out."""

    def weights(config: PretrainedConfig) -> float:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return sum(p.numel() for p in model.parameters())  # tied: the embedding counts once, as the lm_head

    return 6 * weights(case.student) + sum(2 * weights(config) for config in case.teachers)


class Watch(TrainerCallback):
    """Per step: the teachers' own seconds, and those of the loss; from all steps: the peak of the GPU's memory."""

    def __init__(self, pool: TeacherPool, device: torch.device, started: float):
        """started: when loading began (monotonic)."""
        self.pool, self.device, self.peak = pool, device, 0
        self.started, self.ended = started, 0.0
        """The latter: when the first step ended."""
        self.teachers: list[float] = []
        self.losses: list[float] = []
        self._spans: list[tuple[Any, Any]] = []
        self._stop = threading.Event()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Adds up the step."""
        self.teachers.append(sum(event.ended - event.started for event in self.pool.events))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ended = self.ended or time.monotonic()
        self.losses.append(sum(self._length(*span) for span in self._spans))
        self._spans.clear()

    def _length(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def watching(self):
        """Times every call of the loss in the student's forward (where the fused path makes its gradients too), samples the memory."""
        original = xtoken_core.training.student.distillation_loss

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            out = original(*args, **kwargs)
            self._spans.append((start, self._now()))
            return out

        def sample() -> None:
            while not self._stop.wait(0.05):
                free, total = torch.cuda.mem_get_info()
                self.peak = max(self.peak, total - free)

        sampler = threading.Thread(target=sample)
        if self.device.type == "cuda":
            sampler.start()
        xtoken_core.training.student.distillation_loss = timed
        try:
            yield
        finally:
            xtoken_core.training.student.distillation_loss = original
            self._stop.set()
            if sampler.is_alive():
                sampler.join()


def student_of(case: Case, spec: DistillationSpec, device: torch.device) -> PreTrainedModel:
    """The case's student with random weights: in float32, or with adapters in bfloat16."""
    dtype = torch.float32 if case.lora is None else torch.bfloat16
    with device:
        model = AutoModelForCausalLM.from_config(case.student, dtype=dtype, attn_implementation="sdpa")
    if case.lora is not None:
        add_adapters(model, LoraSpec(rank=case.lora), None)
    return prepare_student(model, spec.training)


def on_this_rank(case: Case, run: Run, work: Path, rate: float) -> dict[str, Any]:
    """One case's line, from this process, one of a GPU each; without GPUs they share the CPU."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return measured(case, run, device, work, rate)


def measured(case: Case, run: Run, device: torch.device, work: Path, rate: float) -> dict[str, Any]:
    """One case's line. `rate`: operations a second."""
    rank, ranks, rows = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), run.rows
    spec, started = spec_of(case, run), time.monotonic()
    start_server(TEACHERS_IMPORT)  # as distill does
    out = Path(tempfile.mkdtemp(dir=work))
    args = training_arguments(spec, out, rows=1)
    teachers = []
    for i, (teacher, config) in enumerate(zip(spec.teachers, case.teachers)):
        model = save_random(config, model_folder(work, config), device)
        setup = TeacherSetup(
            name=f"teachers.{i}", model=model, num_ids=config.vocab_size, min_rows=config.vocab_size, transport="hidden", top_k=None,
            residency=case.residency, dtype=torch.bfloat16, attention="sdpa", device=device, threads=torch.get_num_threads(),
            compile=case.compile, fp8=case.fp8, shards=run.address and Shards(f"{run.address}{i}", rank, ranks),
        )  # fmt: skip
        w = made_up_projection(case.student.vocab_size, config.vocab_size, device) if teacher.cross_tokenizer else None
        teachers.append(ReadyTeacher(teacher.id, setup, fingerprint="", mode=run.mode if w else None, projection=w))
    student = Student(Loaded(student_of(case, spec, device), None, None, case.student.vocab_size), spec.loss, {})  # type: ignore[arg-type]  # it saves nothing
    columns = [f"teacher_{teacher.id}" if teacher.cross_tokenizer else None for teacher in spec.teachers]
    pads = dict.fromkeys(["student", *(c for c in columns if c)], 0)
    with (
        TeacherPool([teacher.setup for teacher in teachers]) as pool,
        RunLog(out / "log.jsonl", args.max_steps, None) as log,
    ):  # each rank its own
        watch = Watch(pool, device, started)
        data = TrainingData(Collator(columns, pads), made_up_rows(case, spec, 64))
        record = RunRecord(out, log=log)
        trainer = DistillationTrainer(student, args, data, Teaching(tuple(teachers), pool), record, [watch])
        with watch.watching():
            trainer.train()
        resident = [teacher.resident for teacher in pool.teachers]
    first, _, *lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    def mean(key: str) -> float:
        return statistics.fmean(line[key] for line in lines)

    step, teachers, loss = mean("seconds_step"), statistics.fmean(watch.teachers[2:]), statistics.fmean(watch.losses[2:])
    floor = flops_per_token(case) * rows * case.length / rate / ranks
    seconds = {
        "step": step, "teachers": teachers, **{t.id: statistics.fmean(line["teachers"][t.id]["seconds"] for line in lines) for t in spec.teachers}, "data": mean("seconds_data"),
        "hand_over": mean("seconds_teachers") - teachers, "student": step - mean("seconds_teachers") - mean("seconds_data"), "loss": loss,
    }  # fmt: skip
    return {
        "case": case.name, "tokens_per_second": round(mean("tokens_per_second")), "gpus": ranks, "sharding": run.sharding if ranks > 1 else None, "sharded_teachers": bool(run.address), "rows": rows, "length": case.length, "micro_batch": run.micro_batch, "mode": run.mode, "first_step": round(first["seconds_step"], 1), "first_step_teachers": round(first["seconds_teachers"], 1), "to_first_step": round(watch.ended - started, 1),
        "seconds": {name: round(value, 4) for name, value in seconds.items()}, "hand_over_share": round(seconds["hand_over"] / step, 4),
        "peak_gib": round(watch.peak / GIB, 1), "resident": resident, "floor_share": round(floor / step, 3), "last_loss": lines[-1]["loss"],
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="*", help="names; default: all")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after two others")
    parser.add_argument("--rows", type=int, default=32, help="rows of an optimizer step")
    parser.add_argument("--micro-batch", type=int, default=1, help="rows of one forward of the student")
    parser.add_argument("--mode", default="p_kl", help="loss of teachers with another vocabulary")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--sharding", choices=["ddp", "fsdp"], default="ddp", help="of the student, on several GPUs")
    parser.add_argument("--shard-teachers", action="store_true", help="spread each teacher's weights over the GPUs")
    parser.add_argument("--work", type=Path, help="folder for the random models; default: a temporary one")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.disable_progress_bar()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    rate = rates()[1] if device.type == "cuda" else _cpu_rate()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of several GPUs' ranks, the first would count it
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for case in CASES[options.device]:
            if options.cases and case.name not in options.cases:
                continue
            for config in case.teachers:
                save_random(config, model_folder(work, config), device)
            address = "tcp://localhost:2950" if options.shard_teachers else None
            run = Run(options.steps, options.rows, options.micro_batch, options.mode, options.sharding, address)
            if options.gpus > 1:
                results.append(on_every_gpu(options.gpus, on_this_rank, (case, run, work, rate)))
            else:
                results.append(measured(case, run, device, work, rate))
            print(json.dumps(results[-1]), flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(json.dumps({
        "summary": "training", "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "tflop_per_s": round(rate / 1e12, 2), "tokens_per_second": {r["case"]: r["tokens_per_second"] for r in results},
        "target_tokens_per_second": 8000 if device.type == "cuda" else None, "target_peak_gib": 76, "target_hand_over_share": 0.02,
        "met": all(r["tokens_per_second"] >= 8000 and r["peak_gib"] <= 76 and r["hand_over_share"] <= 0.02 for r in results),
    }))  # fmt: skip


def _cpu_rate() -> float:
    """Operations a second of a bf16 product."""
    a, b = (torch.randn(1024, 1024, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    started = time.perf_counter()
    for _ in range(5):
        a @ b
    return 5 * 2 * 1024**3 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
