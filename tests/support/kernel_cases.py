"""Small batches on which the kernels are held to the plain path: every mode, option and way in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from tests.support.losses_cases import MODES, random_batch, random_projection, random_teacher
from xtoken_core.losses import CellCut, HiddenLogits, TopKLogits, plain
from xtoken_core.losses.logits import AveragedLogits, LogitsForm, as_form
from xtoken_core.losses.resolve import resolve_teachers
from xtoken_core.losses.types import Coefficients, StudentBatch
from xtoken_core.spec import LossSpec


@dataclass(frozen=True)
class Case:
    """One batch: teachers' modes (`same`, `same_part` of the samples, `top_k`, `averaged`, `scored`: partition_kl of some cells, p_kl, gold, h_kl), options of the loss, and how logits come."""

    modes: tuple[str, ...]
    options: dict = field(default_factory=dict)
    batch: int = 2
    length: int = 9
    vocab: int = 37
    hidden: bool = False
    coefficients: bool = False
    learnable: bool = False
    top_k_entries: int = 3
    head: dict = field(default_factory=dict)
    seed: int = 0


CASES = {
    "p_kl": Case(("p_kl",), {"vocab_topk": 12}),
    "p_kl_reverse_temperature": Case(("p_kl",), {"vocab_topk": 12, "reverse_kl": True, "temperature": 2.0}, seed=1),
    "p_kl_first": Case(("p_kl",), {"vocab_topk": 12, "chunk_distribution": "first"}, seed=2),
    "p_kl_first_reverse": Case(("p_kl",), {"vocab_topk": 12, "chunk_distribution": "first", "reverse_kl": True}, seed=3),
    "p_kl_batch_scope": Case(("p_kl",), {"vocab_topk": 12, "topk_scope": "batch"}, seed=4),
    "p_kl_whole": Case(("p_kl",), {"vocab_topk": 1000}, seed=5),
    "p_kl_many_entries": Case(("p_kl",), {"vocab_topk": 5}, vocab=150, top_k_entries=9, seed=6),
    "p_kl_learnable": Case(("p_kl",), {"vocab_topk": 12, "temperature": 1.5}, learnable=True, seed=7),
    "same": Case(("same",), {"vocab_topk": 12}, seed=8),
    "same_reverse_temperature": Case(("same",), {"vocab_topk": 12, "reverse_kl": True, "temperature": 2.0}, seed=9),
    "same_whole": Case(("same",), {"vocab_topk": 1000, "temperature": 2.0}, seed=10),
    "same_part": Case(("same_part", "p_kl", "same"), {"vocab_topk": 12}, batch=3, seed=40),
    "same_part_whole": Case(("same_part",), {"vocab_topk": 1000, "temperature": 2.0}, seed=41),
    "top_k": Case(("top_k",), {"vocab_topk": 20, "temperature": 1.3}, seed=11),
    "averaged": Case(("averaged",), {"temperature": 1.3}, seed=12),
    "averaged_reverse": Case(("averaged",), {"reverse_kl": True}, seed=13),
    "gold": Case(("gold",), {"uncommon_topk": 6}, seed=14),
    "gold_all_uncommon": Case(("gold",), {"temperature": 0.7}, seed=15),
    "h_kl": Case(("h_kl",), {"uncommon_topk": 6, "temperature": 2.0}, seed=16),
    "h_kl_reverse": Case(("h_kl",), {"uncommon_topk": 6, "reverse_kl": True}, seed=17),
    "h_kl_first": Case(("h_kl",), {"chunk_distribution": "first"}, seed=18),
    "several": Case(("p_kl", "same", "gold"), {"vocab_topk": 12, "temperature": 1.5}, seed=19),
    "two_p_kl": Case(("p_kl", "p_kl"), {"vocab_topk": 12}, coefficients=True, seed=20),
    "two_h_kl": Case(("h_kl", "gold"), {"reverse_kl": True}, seed=21),
    "no_teacher": Case((), {}, seed=22),
    "hidden_p_kl": Case(("p_kl",), {"vocab_topk": 12}, hidden=True, coefficients=True, seed=23),
    "hidden_p_kl_learnable": Case(("p_kl",), {"vocab_topk": 12}, hidden=True, coefficients=True, learnable=True, seed=24),
    "hidden_late": Case(("p_kl", "same"), {"vocab_topk": 12, "temperature": 2.0}, hidden=True, seed=25),
    "hidden_capped": Case(
        ("p_kl",), {"vocab_topk": 12}, hidden=True, coefficients=True, head={"softcap": 5.0, "scale": 0.5}, seed=26
    ),
    "hidden_gold": Case(("gold",), {"uncommon_topk": 6}, hidden=True, coefficients=True, head={"bias": True}, seed=27),
    "hidden_several": Case(("same", "h_kl", "p_kl"), {"vocab_topk": 12}, hidden=True, coefficients=True, seed=28),
    "partition": Case(("partition_kl", "p_kl"), {"vocab_topk": 12, "temperature": 1.5}, seed=30),
    "hidden_partition": Case(("partition_kl",), {}, hidden=True, coefficients=True, seed=31),
    "hidden_partition_late": Case(("same", "partition_kl", "partition_kl"), {}, hidden=True, seed=32),
    "hidden_partition_capped": Case(
        ("partition_kl",), {}, hidden=True, coefficients=True, head={"softcap": 5.0, "scale": 0.5, "bias": True}, seed=33
    ),
    "hidden_two_partitions": Case(("partition_kl", "partition_kl"), {}, hidden=True, coefficients=True, seed=34),
    "hidden_partition_beside_same": Case(("same", "partition_kl"), {"vocab_topk": 12}, hidden=True, coefficients=True, seed=35),
    "hidden_scored": Case(("scored",), {}, hidden=True, coefficients=True, seed=36),
    "hidden_scored_late": Case(("scored", "partition_kl"), {}, hidden=True, seed=37),
    "hidden_averaged": Case(("averaged",), {}, hidden=True, coefficients=True, seed=29),
}


def _formed(like: torch.Tensor, generator: torch.Generator, head: dict) -> HiddenLogits:
    """Hidden states and an lm_head that form logits of the shape of `like`."""
    b, t, v = like.shape
    hidden, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((b, t, 16), (v, 16), (v,)))
    return HiddenLogits(hidden, weight, bias if head.get("bias") else None, head.get("scale", 1.0), head.get("softcap"))


def build(case: Case):
    """Student's logits in float64, input_ids, token_mask, sample_mask, resolved teachers, spec, coefficients."""
    generator = torch.Generator().manual_seed(case.seed)
    spec = LossSpec(mode="p_kl", **case.options)
    logits, ids, mask, samples = random_batch(case.seed, case.batch, case.length, case.vocab)
    student = _formed(logits, generator, case.head) if case.hidden else as_form(logits)
    teachers = []
    for i, mode in enumerate(case.modes):
        cross, told = mode in (*MODES, "scored"), "partition_kl" if mode == "scored" else mode
        teacher = random_teacher(case.seed + 7 * i, case.batch, case.length, case.vocab, cross, mode=told if cross else None)
        if cross and case.top_k_entries != 3:
            w = random_projection(generator, case.vocab, teacher.logits.shape[-1], case.top_k_entries)
            w.indices[:] = torch.where(w.indices >= 0, w.indices % max(case.vocab // 4, 1), -1)  # columns that many tokens map to
            teacher = replace(teacher, projection=w)
        if case.hidden and mode != "top_k":
            teacher = replace(teacher, logits=_formed(teacher.logits, generator, {}))
        if mode == "scored":
            cut = CellCut.of(teacher.projection.cells, teacher.logits.shape[2], 4, spec.temperature)
            teacher = replace(teacher, logits=cut(teacher.logits, teacher.input_ids))
        if mode == "same_part":
            teacher = replace(teacher, token_mask=mask * (torch.arange(case.batch) % 2 == 0)[:, None])
        if mode == "top_k":
            values, indices = teacher.logits.topk(8)
            teacher = replace(teacher, logits=TopKLogits(values, indices, case.vocab))
        if mode == "averaged":
            other = random_teacher(case.seed + 50, case.batch, case.length, case.vocab, False).logits
            teacher = replace(teacher, logits=AveragedLogits((as_form(teacher.logits), as_form(other)), (0.3, 0.7)))
        teachers.append(teacher)
    teachers = resolve_teachers(teachers, ids, mask, spec)
    n = len(teachers)
    coefficients = Coefficients(torch.tensor(0.7), torch.arange(1, n + 1) * 0.3) if case.coefficients else None
    return student, ids, mask, samples, teachers, spec, coefficients


def _moved(x: LogitsForm, device, dtype) -> LogitsForm:
    """Every floating tensor to `dtype`, all to `device`, as leaves."""

    def move(tensor):
        return tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    if isinstance(x, AveragedLogits):
        return replace(x, parts=tuple(_moved(part, device, dtype) for part in x.parts))
    x = x.over_positions(move)
    if not isinstance(x, HiddenLogits):
        return x
    return replace(x, weight=move(x.weight), bias=None if x.bias is None else move(x.bias))


def evaluate(implementation, case: Case, device: torch.device, dtype: torch.dtype, inputs_dtype: torch.dtype | None = None):
    """(TermSums, gradients) in `dtype`; inputs are rounded to `inputs_dtype` first. The graph is retained."""
    student, ids, mask, samples, teachers, spec, coefficients = build(case)
    if inputs_dtype is not None:
        student = _moved(student, "cpu", inputs_dtype)
        teachers = [replace(t, logits=_moved(t.logits, "cpu", inputs_dtype)) for t in teachers]
    student = _moved(student, device, dtype)
    leaves = [x for x in student.tensors if x is not None]
    moved = []
    for t in teachers:
        fields = {k: getattr(t, k).to(device) for k in ("input_ids", "token_mask", "student_chunk_id", "teacher_chunk_id", "chunk_valid", "chunk_exact") if getattr(t, k) is not None}  # fmt: skip  # noqa: E501
        projection = t.projection
        if projection is not None:
            weights = projection.weights.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
            if case.learnable:
                leaves.append(weights.requires_grad_())
            cells = projection.cells and projection.cells.to(device)
            projection = replace(projection, indices=projection.indices.to(device), weights=weights, cells=cells, tables={})
        moved.append(replace(t, logits=_moved(t.logits, device, dtype), projection=projection, **fields))
    for leaf in leaves:
        leaf.requires_grad_()
    if coefficients is not None:
        coefficients = Coefficients(coefficients.ce.to(device), coefficients.kd.to(device))
    batch = StudentBatch(student, ids.to(device), mask.to(device), samples.to(device))
    sums = implementation(batch, moved, spec, coefficients)
    if coefficients is not None:
        value = sums.total
    else:
        value = 0.7 * sums.ce + sum(0.3 * (i + 1) * kd for i, kd in enumerate(sums.kd))
    (1.3 * value).backward(retain_graph=True)
    return sums, [leaf.grad for leaf in leaves]


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative, by Frobenius norms."""
    found, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))


def compare(case: Case, device: torch.device, dtype: torch.dtype, tolerance: float = 1e-5) -> None:
    """The kernels on `device` in `dtype` against the plain path in float64 on the same numbers."""
    from xtoken_core.losses.kernels import term_sums

    found, gradients = evaluate(term_sums, case, device, dtype, inputs_dtype=dtype)
    truth, expected = evaluate(plain.term_sums, case, torch.device("cpu"), torch.float64, inputs_dtype=dtype)
    for name in ("ce", "kd", "correct", "common", "uncommon"):
        a, b = getattr(found, name), getattr(truth, name)
        assert a.shape == b.shape, name
        assert torch.allclose(a.double().cpu(), b.double(), rtol=1e-5, atol=2e-6), (name, a, b)
    _, plainly = evaluate(plain.term_sums, case, device, dtype)
    for i, (a, b, c) in enumerate(zip(gradients, expected, plainly, strict=True)):
        assert a.isfinite().all()
        assert distance(a, b) < max(tolerance, 1.5 * distance(c, b)), (i, distance(a, b), distance(c, b))
