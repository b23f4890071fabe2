"""Speed and memory of the losses: `python -m tests.benchmarks.loss --device cuda|cpu [--vs torch] [--cases p_kl ...] [--projections FOLDER]`.

One JSON line per case: median milliseconds of `distillation_loss` forward and backward (`ms`: in a row of calls, as in training, where the
host runs ahead; `ms_from_idle`: when the device has nothing to do, so that the host's time counts too; `ms_graph`: replayed as a CUDA graph, without the host), GiB beyond the inputs and the gradients, the floor (each
logit read once and its gradient written once at the measured copy rate; from hidden states the matrix products at the measured rate, one
of the teacher's size and three of the student's) and the time over it. The last line is a summary. `--vs torch` also measures the loss in
plain PyTorch on the same device (`cuda`, cases of T = 2048). `cpu` measures the plain path against loops over chunks and rows.

Batches are made up: one row, logits with a Zipf-like slope over the ids, chunks mostly of one token a side. W is made up too, after what
Llama-3 under Qwen3 looks like (86 % of tokens shared, the rest in 2 to 4 pieces), or read from `--projections`: llama3-qwen3.safetensors and
llama3-o200k.safetensors, as `Projection.save` writes them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from xtoken_core.losses import HiddenLogits, TeacherBatch, distillation_loss, plain
from xtoken_core.losses.logits import as_form
from xtoken_core.losses.resolve import resolve_teachers
from xtoken_core.losses.selection import chunk_rows, top_columns
from xtoken_core.losses.tables import common_pairs
from xtoken_core.losses.types import StudentBatch
from xtoken_core.partition import Partition
from xtoken_core.projection import Projection
from xtoken_core.spec import LossSpec

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One line of the benchmark."""

    mode: str
    """p_kl | gold | h_kl | same | averaged."""
    student: tuple[int, int]
    """Rows, columns."""
    teacher: tuple[int, int]
    hidden: tuple[int, int] | None = None
    """Sizes of the hidden states, or None: from logits."""
    target_ms: float | None = None
    target_gib: float | None = None
    """The gradient over the logits."""

    @property
    def name(self) -> str:
        """For the reader."""
        return f"{self.mode}_{'hidden' if self.hidden else 'logits'}_{self.student[0]}"


_S, _Q, _O = 128256, 151936, 200064
_D = (2048, 2560)
CASES = [
    Case("p_kl", (2048, _S), (2017, _Q), None, 3.0, 0.5),
    Case("gold", (2048, _S), (2017, _Q), None, 9.0, 1.0),
    Case("h_kl", (2048, _S), (2017, _Q), None, 9.0, 1.0),
    Case("same", (2048, _S), (2048, _S), None, 1.8),
    Case("averaged", (2048, _S), (2048, _S)),
    Case("p_kl", (4096, _S), (4055, _O), None, 5.0),
    Case("gold", (4096, _S), (4055, _O), None, 22.0),
    Case("h_kl", (4096, _S), (4055, _O), None, 22.0),
    Case("same", (4096, _S), (4096, _S), None, 3.0),
    Case("p_kl", (2048, _S), (2017, _Q), _D, 9.0, 0.6),
    Case("partition_kl", (2048, _S), (2017, _Q), _D),
    Case("gold", (2048, _S), (2017, _Q), _D, 14.0),
    Case("h_kl", (2048, _S), (2017, _Q), _D, 14.0),
    Case("p_kl", (4096, _S), (4055, _Q), _D, 19.0),
    Case("gold", (4096, _S), (4055, _Q), _D, 30.0),
    Case("h_kl", (4096, _S), (4055, _Q), _D, 30.0),
    Case("p_kl", (32768, _S), (32440, _Q), None, 60.0),
    Case("gold", (32768, _S), (32440, _Q), None, 170.0),
    Case("h_kl", (32768, _S), (32440, _Q), None, 170.0),
    Case("same", (32768, _S), (32768, _S), None, 30.0),
    Case("p_kl", (32768, _S), (32440, _Q), _D, 150.0, 2.0),
    Case("gold", (32768, _S), (32440, _Q), _D, 260.0),
    Case("h_kl", (32768, _S), (32440, _Q), _D, 260.0),
]


def made_up_projection(student_vocab: int, teacher_vocab: int, device: torch.device) -> Projection:
    """Six tokens in seven shared, in much the same order; the others spelt in 2 to 4 pieces, among the teacher's low ids more often than not."""
    g = torch.Generator().manual_seed(5)
    shared = torch.rand(student_vocab, generator=g) < 0.856
    columns = torch.sort(torch.randperm(teacher_vocab, generator=g)[:student_vocab]).values
    columns = torch.nn.functional.pad(columns, (0, max(0, student_vocab - teacher_vocab)))
    swap = torch.rand(student_vocab, generator=g) < 0.1
    columns[swap] = columns[swap][torch.randperm(int(swap.sum()), generator=g)]
    pieces = (torch.rand(student_vocab, 4, generator=g).pow(4) * teacher_vocab).long()
    count = torch.multinomial(torch.tensor([0.0, 0.0, 0.68, 0.25, 0.07]), student_vocab, replacement=True, generator=g)
    count[shared] = 1
    pieces[shared, 0] = columns[shared]
    inside = torch.arange(4) < count[:, None]
    weights = (0.9 * 0.1 ** torch.arange(4)).expand(student_vocab, 4) * inside
    weights = weights / weights.sum(1, keepdim=True)
    indices = torch.where(inside, pieces, -1)
    return Projection(
        indices.to(device), weights.to(device), teacher_vocab, cells=made_up_cells(indices, teacher_vocab).to(device)
    )


def made_up_cells(indices: Tensor, teacher_vocab: int) -> Partition:
    """A cell for every teacher's token that some student's token reads as; every other token is in one of them, often in an early one."""
    g = torch.Generator().manual_seed(7)
    shared = indices[:, 0].unique()
    teacher = (torch.rand(teacher_vocab, generator=g).pow(4) * len(shared)).long()
    teacher[shared] = torch.arange(len(shared))
    return Partition(teacher[indices[:, 0]], teacher, len(shared))


def stored_projection(folder: Path, teacher_vocab: int, device: torch.device) -> Projection | None:
    """W of real tokenizers for the two sizes that have one; the model's columns beyond the tokenizer's ids count as unreached."""
    path = folder / {_Q: "llama3-qwen3.safetensors", _O: "llama3-o200k.safetensors"}[teacher_vocab]
    if not path.exists():
        return None
    tensors = load_file(path)
    exact = tensors["exact"].bool().to(device) if "exact" in tensors else None
    return Projection(tensors["indices"].long().to(device), tensors["weights"].float().to(device), teacher_vocab, exact)


def chunk_ids(student: int, teacher: int) -> tuple[Tensor, Tensor, int]:
    """Ascending chunk ids of both sides; mostly one token to one."""
    g = torch.Generator().manual_seed(6)
    shapes = torch.tensor([(1, 1), (2, 1), (1, 2), (1, 3), (3, 3)])
    drawn = shapes[torch.multinomial(torch.tensor([0.93, 0.035, 0.015, 0.005, 0.015]), student, replacement=True, generator=g)]
    ids = [torch.repeat_interleave(torch.arange(student), drawn[:, i]) for i in (0, 1)]
    ids = [torch.nn.functional.pad(x[:n], (0, max(0, n - x.numel())), value=-1)[None] for x, n in zip(ids, (student, teacher))]
    return ids[0], ids[1], student


def logits(rows: int, columns: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1, rows, columns]: noise, and a slope over the ids as in real vocabularies, where early ids are frequent."""
    g = torch.Generator(device).manual_seed(seed)
    slope = -1.5 * torch.log(1 + torch.arange(columns, device=device) / 500)
    out = torch.empty(1, rows, columns, device=device, dtype=dtype)
    for first in range(0, rows, 1024):
        part = out[:, first : first + 1024]
        part.copy_(2.0 * torch.randn(part.shape, device=device, generator=g) + slope)
    return out


def head(rows: int, columns: int, width: int, seed: int, device: torch.device, dtype: torch.dtype) -> HiddenLogits:
    """Hidden states and lm_head whose logits look like `logits`."""
    g = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(1, rows, width, device=device, generator=g)
    weight = torch.randn(columns, width, device=device, generator=g) * (2.0 / width**0.5)
    hidden[..., 0] = 1
    weight[:, 0] = -1.5 * torch.log(1 + torch.arange(columns, device=device) / 500)
    return HiddenLogits(hidden.to(dtype), weight.to(dtype))


def make(case: Case, device: torch.device, dtype: torch.dtype, folder: Path | None):
    """(student, input_ids, token_mask, sample_mask), teachers, spec, leaves."""
    (t_s, v_s), (t_t, v_t) = case.student, case.teacher
    if case.hidden:
        student = head(t_s, v_s, case.hidden[0], 1, device, dtype)
        teacher_logits: Tensor | HiddenLogits = head(t_t, v_t, case.hidden[1], 2, device, dtype)
        leaves = [student.hidden.requires_grad_(), student.weight.requires_grad_()]
    else:
        student = logits(t_s, v_s, 1, device, dtype).requires_grad_()
        teacher_logits = logits(t_t, v_t, 2, device, dtype)
        leaves = [student]
    ids = torch.randint(0, v_s, (1, t_s), device=device)
    ones = torch.ones_like(ids)
    spec = LossSpec(mode="auto" if case.mode in ("same", "averaged") else case.mode, dynamic_scaling=False)
    if case.mode in ("same", "averaged"):
        teachers = [TeacherBatch(teacher_logits)]
        if case.mode == "averaged":
            spec = LossSpec(aggregation="averaged_logits", dynamic_scaling=False)
            teachers = [TeacherBatch(teacher_logits, weight=0.7), TeacherBatch(logits(t_t, v_t, 3, device, dtype), weight=0.3)]
    else:
        s_chunk, t_chunk, count = (x.to(device) if isinstance(x, Tensor) else x for x in chunk_ids(t_s, t_t))
        w = stored_projection(folder, v_t, device) if folder else None
        teachers = [
            TeacherBatch(
                teacher_logits,
                input_ids=torch.zeros(1, t_t, dtype=torch.int64, device=device),
                token_mask=torch.ones(1, t_t, dtype=torch.int64, device=device),
                student_chunk_id=s_chunk,
                teacher_chunk_id=t_chunk,
                chunk_valid=torch.ones(1, count, dtype=torch.bool, device=device),
                chunk_exact=torch.ones(1, count, dtype=torch.bool, device=device),
                projection=w or made_up_projection(v_s, v_t, device),
            )
        ]
    return (student, ids, ones, torch.ones(1, dtype=torch.bool, device=device)), teachers, spec, leaves


def loss_step(batch, teachers: list[TeacherBatch], spec: LossSpec, leaves: list[Tensor]) -> Tensor:
    """Forward and backward once."""
    for leaf in leaves:
        leaf.grad = None
    loss = distillation_loss(*batch, teachers, spec).loss
    loss.backward()
    return loss.detach()


def torch_step(batch, teachers: list[TeacherBatch], spec: LossSpec, leaves: list[Tensor]) -> Tensor:
    """The same in plain PyTorch."""
    for leaf in leaves:
        leaf.grad = None
    resolved = resolve_teachers(teachers, batch[1], batch[2], spec)
    sums = plain.term_sums(StudentBatch(as_form(batch[0]), *batch[1:]), resolved, spec)
    loss = spec.ce_weight * sums.ce / batch[1].numel() + spec.kd_weight * sums.kd.sum() / batch[1].numel()
    loss.backward()
    return loss.detach()


def timed_cuda(step: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    """Median milliseconds of a step among others (the host may run ahead), and of a step that finds the device idle."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    medians = []
    for wait in (False, True):
        events = []
        for _ in range(repeats):
            if wait:
                torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        medians.append(statistics.median(start.elapsed_time(end) for start, end in events))
    return medians[0], medians[1]


def graph_ms(step: Callable[[], Tensor], repeats: int) -> float | None:
    """Median milliseconds of a step replayed as a CUDA graph, which takes the host out; None where a step waits for the host."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return timed_cuda(graph.replay, repeats)[0]


def extra_bytes(step: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """Peak allocation of one step beyond the inputs and the gradients."""
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in leaves)


def rates() -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), and operations a second of a large bf16 product."""
    a = torch.randn(2**30, dtype=torch.bfloat16, device="cuda")
    b = torch.empty_like(a)
    copy, _ = timed_cuda(lambda: b.copy_(a), 10)
    m = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product, _ = timed_cuda(lambda: m @ m, 10)
    return 4 * a.numel() / copy * 1e3, 2 * 8192**3 / product * 1e3


def floor_ms(case: Case, copy_rate: float, product_rate: float) -> float:
    """The least time the case can take."""
    student, teacher = case.student[0] * case.student[1], case.teacher[0] * case.teacher[1]
    if case.hidden:
        return (6 * student * case.hidden[0] + 2 * teacher * case.hidden[1]) / product_rate * 1e3
    return 2 * (2 * student + teacher * (2 if case.mode == "averaged" else 1)) / copy_rate * 1e3


def measured(case: Case, vs_torch: bool, folder: Path | None, copy_rate: float, product_rate: float) -> dict:
    """One case's line."""
    batch, teachers, spec, leaves = make(case, torch.device("cuda"), torch.bfloat16, folder)

    def step() -> Tensor:
        return loss_step(batch, teachers, spec, leaves)

    def plain_step() -> Tensor:
        return torch_step(batch, teachers, spec, leaves)

    ms, idle_ms = timed_cuda(step, 20 if case.student[0] <= 4096 else 3)
    extra = extra_bytes(step, leaves) / GIB
    floor = floor_ms(case, copy_rate, product_rate)
    replayed = graph_ms(step, 20) if case.student[0] <= 4096 and not case.hidden else None
    line = {
        "case": case.name, "teacher_vocab": case.teacher[1], "ms": round(ms, 3), "ms_from_idle": round(idle_ms, 3), "ms_graph": replayed and round(replayed, 3),
        "extra_gib": round(extra, 3), "floor_ms": round(floor, 3), "ratio": round(ms / floor, 2), "target_ms": case.target_ms,
        "target_gib": case.target_gib,
    }  # fmt: skip
    line["met"] = (case.target_ms is None or ms <= case.target_ms) and (case.target_gib is None or extra <= case.target_gib)
    if vs_torch and case.student[0] <= 2048:
        plain_ms, _ = timed_cuda(plain_step, 3)
        line |= {"torch_ms": round(plain_ms, 1), "torch_extra_gib": round(extra_bytes(plain_step, leaves) / GIB, 2)}
    return line


def run_cuda(names: list[str] | None, vs_torch: bool, folder: Path | None) -> list[dict]:
    """All cases on a GPU."""
    copy_rate, product_rate = rates()
    results = []
    for case in CASES:
        if names and not any(n in (case.name, case.mode, str(case.student[0])) for n in names):
            continue
        results.append(measured(case, vs_torch, folder, copy_rate, product_rate))
        print(json.dumps(results[-1]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps({
        "summary": "loss", "device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_tb_per_s": round(copy_rate / 1e12, 2),
        "bf16_tflop_per_s": round(product_rate / 1e12), "cases": len(results), "met": sum(r["met"] for r in results),
        "w": "stored" if folder else "made up",
    }))  # fmt: skip
    return results


def loop_step(batch, teachers: list[TeacherBatch], spec: LossSpec, leaves: list[Tensor]) -> Tensor:
    """The loss of one row as one would write it down: a loop over chunks, and W as a sparse matrix. p_kl, gold, h_kl and same vocabulary."""
    student, ids, token_mask, sample_mask = batch
    student.grad = None
    [teacher] = resolve_teachers(teachers, ids, token_mask, spec)
    log_p, log_t = student[0].log_softmax(-1), teacher.logits[0].log_softmax(-1)
    ce = torch.nn.functional.cross_entropy(student[0, :-1], ids[0, 1:])
    terms = []
    if teacher.projection is None:
        k = top_columns(teacher, spec)[0]
        s, t = student[0, :-1][:, k].log_softmax(-1), teacher.logits[0, :-1][:, k].log_softmax(-1)
        terms = [(t.exp() * (t - s)).sum() / (student.shape[1] - 1)]
    else:
        rows = chunk_rows(teacher, sample_mask, spec)
        w, (v_s, v_t) = teacher.projection, (student.shape[2], teacher.logits.shape[2])
        if teacher.mode == "p_kl":
            k = top_columns(teacher, spec)[0]
            row, slot = (w.indices >= 0).nonzero(as_tuple=True)
            entries = torch.stack([w.indices[row, slot], row])
            matrix = torch.sparse_coo_tensor(entries, w.weights[row, slot], (v_t, v_s)).coalesce()
            q = torch.sparse.mm(matrix, log_p.exp().T).T[:, k]
            r = teacher.logits[0][:, k].log_softmax(-1)
        else:
            pairs = common_pairs(w, teacher.mode, v_s, v_t)
            depth = min(pairs.uncommon_student.numel(), pairs.uncommon_teacher.numel(), spec.uncommon_topk)
        for chunk in range(rows.valid.numel()):
            if not rows.valid[chunk]:
                continue
            mine, theirs = (rows.student == chunk).nonzero().squeeze(1), (rows.teacher == chunk).nonzero().squeeze(1)
            if teacher.mode == "p_kl":
                mass = q[mine].mean(0)
                target = r[theirs].mean(0)
                terms.append((target.exp() * (target - (mass / (mass.sum() + 1e-10) + 1e-10).log())).sum())
            else:
                s, t = log_p[mine].mean(0), log_t[theirs].mean(0)
                common_s, common_t = s[pairs.student], t[pairs.teacher]
                rest_s, rest_t = (
                    x.exp().sort(descending=True).values[:depth] for x in (s[pairs.uncommon_student], t[pairs.uncommon_teacher])
                )
                terms.append((common_t.exp() * (common_t - common_s)).sum() + (rest_s - rest_t).abs().sum())
        terms = [torch.stack(terms).mean()]
    loss = spec.kd_weight * terms[0] + spec.ce_weight * ce
    loss.backward()
    return loss.detach()


def timed_cpu(step: Callable[[], Tensor], repeats: int) -> float:
    """Median milliseconds."""
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def run_cpu(names: list[str] | None) -> list[dict]:
    """The plain path and the loops, in one run: T = 256, 32,000 x 48,000, float32."""
    results = []
    for mode in ("p_kl", "gold", "h_kl", "same"):
        if names and mode not in names:
            continue
        case = Case(mode, (256, 32000), (256, 32000) if mode == "same" else (252, 48000))
        batch, teachers, spec, leaves = make(case, torch.device("cpu"), torch.float32, None)
        ours, loops = loss_step(batch, teachers, spec, leaves), loop_step(batch, teachers, spec, leaves)
        assert torch.allclose(ours.float(), loops, rtol=1e-3), (mode, ours, loops)
        ms = timed_cpu(lambda: loss_step(batch, teachers, spec, leaves), 3)  # noqa: B023
        loops_ms = timed_cpu(lambda: loop_step(batch, teachers, spec, leaves), 2)  # noqa: B023
        line = {
            "case": f"{mode}_cpu_256",
            "ms": round(ms),
            "loops_ms": round(loops_ms),
            "ratio": round(ms / loops_ms, 3),
            "target_ratio": 2.0,
        }
        results.append(line | {"met": ms <= 2 * loops_ms})
        print(json.dumps(results[-1]), flush=True)
    print(json.dumps({
        "summary": "loss", "device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__, "cases": len(results),
        "met": sum(r["met"] for r in results), "worst_ratio": max((r["ratio"] for r in results), default=None),
    }))  # fmt: skip
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vs", choices=["torch"], help="also measure plain PyTorch in the same run (cuda)")
    parser.add_argument("--cases", nargs="*", help="names, modes or lengths to run; default: all")
    parser.add_argument("--projections", type=Path, help="folder with W of real tokenizers")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
        run_cpu(args.cases)
    else:
        run_cuda(args.cases, args.vs == "torch", args.projections)


if __name__ == "__main__":
    main()
