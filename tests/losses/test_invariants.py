"""What must hold of the losses whatever the batch."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.losses_cases import MODES, identity_projection, random_batch, random_segmentation, random_teacher
from xtoken_core.errors import InputError
from xtoken_core.losses import TeacherBatch, TopKLogits, distillation_loss
from xtoken_core.projection import Projection
from xtoken_core.spec import LossSpec

few = examples(20)
seeds = st.integers(0, 10**6)
B, T, V = 3, 8, 9


def kd_spec(**fields):
    """KD alone, chosen per sequence."""
    return LossSpec(**{"mode": "p_kl", "dynamic_scaling": False, "ce_weight": 0.0, **fields})


def loss_and_gradient(batch, teachers, spec):
    out = distillation_loss(*batch, teachers, spec)
    return out.loss.detach(), torch.autograd.grad(out.loss, batch[0])[0], out.metrics


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one[1], other[1], rtol=1e-10, atol=1e-12)


@few
@given(seed=seeds, mode=st.sampled_from(MODES), k=st.sampled_from([3, 99]), reverse=st.booleans())
def test_a_student_that_is_its_teacher_has_nothing_to_learn(seed, mode, k, reverse):
    """Identity W, `first`, any segmentation: KD and its gradient are 0."""
    student, ids, mask, samples = random_batch(seed, B, T, V)
    chunks = random_segmentation(torch.Generator().manual_seed(seed), B, T, 5)
    every = torch.ones(B, 5, dtype=torch.bool)
    teacher = TeacherBatch(student.detach().clone(), ids, mask, chunks, chunks, every, every, identity_projection(V))
    spec = kd_spec(mode=mode, chunk_distribution="first", vocab_topk=k, reverse_kl=reverse, temperature=1.5)
    for case in (teacher, TeacherBatch(teacher.logits)):
        loss, gradient, _ = loss_and_gradient((student, ids, mask, samples), [case], spec)
        assert loss.abs() < 1e-12
        assert gradient.abs().max() < 1e-12


@few
@given(
    seed=seeds,
    k=st.sampled_from([1, 4, 99]),
    reverse=st.booleans(),
    case=st.sampled_from(["partition_kl", "first", "same", "averaged"]),
)
def test_divergences_are_not_negative(seed, k, reverse, case):
    """Of normalised distributions: partition_kl, p_kl with `first`, the same vocabulary, averaged logits."""
    aggregation = "averaged_logits" if case == "averaged" else "sum"
    mode = "partition_kl" if case == "partition_kl" else "p_kl"
    spec = kd_spec(mode=mode, chunk_distribution="first", vocab_topk=k, reverse_kl=reverse, aggregation=aggregation)
    teachers = [random_teacher(seed, B, T, V, cross=case in ("first", "partition_kl"))]
    assert distillation_loss(*random_batch(seed, B, T, V), teachers, spec).loss >= -1e-12


@few
@given(seed=seeds, mode=st.sampled_from(MODES), distribution=st.sampled_from(["mean", "first"]), k=st.sampled_from([2, 99]))
def test_padding_changes_nothing(seed, mode, distribution, k):
    """Whatever stands in columns of time beyond the text, on either side."""
    student, ids, mask, samples = random_batch(seed, B, T, V)
    teachers = [random_teacher(seed, B, T, V, cross=True), random_teacher(seed, B, T, V, cross=False)]
    spec = LossSpec(mode=mode, chunk_distribution=distribution, vocab_topk=k, weight_metric="entropy")

    def padded(x, value):
        """Three more positions; random logits where no value is given."""
        if value is None:
            return torch.cat([x, 9 * torch.randn(B, 3, x.shape[2], dtype=x.dtype)], 1)
        return torch.nn.functional.pad(x, (0, 3), value=value)

    cross = replace(
        teachers[0],
        logits=padded(teachers[0].logits, None),
        input_ids=padded(teachers[0].input_ids, 1),
        token_mask=padded(teachers[0].token_mask, 0),
        student_chunk_id=padded(teachers[0].student_chunk_id, -1),
        teacher_chunk_id=padded(teachers[0].teacher_chunk_id, -1),
        chunk_valid=torch.nn.functional.pad(teachers[0].chunk_valid, (0, 2)),
        chunk_exact=torch.nn.functional.pad(teachers[0].chunk_exact, (0, 2)),
    )
    same = replace(teachers[1], logits=padded(teachers[1].logits, None))
    long = padded(student.detach(), None).requires_grad_(), padded(ids, 1), padded(mask, 0), samples
    loss, gradient, metrics = loss_and_gradient(long, [cross, same], spec)
    assert gradient[:, T:].abs().max() == 0
    assert_same((loss, gradient[:, :T]), loss_and_gradient((student, ids, mask, samples), teachers, spec))


@few
@given(seed=seeds, mode=st.sampled_from(MODES), metric=st.sampled_from([None, "ce", "max_prob"]), select=st.booleans())
def test_masked_samples_change_nothing(seed, mode, metric, select):
    """Another text in a sample that is masked out, on both sides, and the sample's absence."""
    spec = LossSpec(
        mode=mode,
        vocab_topk=4,
        aggregation="select_teacher" if select else "sum",
        weight_metric=None if select else metric,
    )
    teachers = [random_teacher(seed + i, B, T, V, cross=i < 2) for i in range(3)]
    student, ids, mask, _ = random_batch(seed, B, T, V)
    before = loss_and_gradient((student, ids, mask, torch.tensor([1.0, 0.0, 1.0])), teachers, spec)
    assert before[1][1].abs().max() == 0

    changed = student.detach().clone()
    changed[1] = 9 * torch.randn(T, V)
    others = []
    for teacher in teachers:
        logits = teacher.logits.clone()
        logits[1] = 9 * torch.randn(logits.shape[1:])
        others.append(replace(teacher, logits=logits))
    assert_same(before, loss_and_gradient((changed.requires_grad_(), ids, mask, torch.tensor([1.0, 0.0, 1.0])), others, spec))

    kept = torch.tensor([0, 2])
    loss, gradient, _ = loss_and_gradient(
        samples_of((student, ids, mask, torch.ones(3)), kept), [part(t, kept) for t in teachers], spec
    )
    assert_same((before[0], before[1][kept]), (loss, gradient))


def samples_of(batch, kept):
    student, *rest = batch
    return student.detach()[kept].requires_grad_(), *(x[kept] for x in rest)


def part(teacher, kept):
    """The same teacher over some of the samples."""
    fields = {f.name: getattr(teacher, f.name) for f in dataclasses.fields(teacher)}
    return replace(teacher, **{name: x[kept] for name, x in fields.items() if isinstance(x, torch.Tensor)})


@few
@given(seed=seeds, mode=st.sampled_from(MODES), distribution=st.sampled_from(["mean", "first"]))
def test_tokens_outside_chunks_change_nothing(seed, mode, distribution):
    """Rows whose next token is in no chunk, on both sides, do not touch a cross-tokenizer KD (compared over all teacher columns)."""
    batch = random_batch(seed, B, T, V)
    teacher = random_teacher(seed, B, T, V, cross=True)
    spec = kd_spec(mode=mode, chunk_distribution=distribution)

    def disturbed(logits, chunk_id):
        outside = torch.nn.functional.pad(chunk_id[:, 1:], (0, 1), value=-1) < 0
        return torch.where(outside[..., None], 9 * torch.randn_like(logits), logits.detach())

    student = disturbed(batch[0], teacher.student_chunk_id).requires_grad_()
    other = replace(teacher, logits=disturbed(teacher.logits, teacher.teacher_chunk_id))
    before = loss_and_gradient(batch, [teacher], spec)
    after = loss_and_gradient((student, *batch[1:]), [other], spec)
    assert_same(before, after)


@few
@given(
    seed=seeds,
    mode=st.sampled_from(MODES),
    options=st.sampled_from(
        [
            {},
            {"weight_metric": "ce", "normalize_by_vocab": True},
            {"weight_metric": "entropy"},
            {"aggregation": "select_teacher"},
            {"aggregation": "averaged_logits"},
        ]
    ),
)
def test_order_of_teachers_and_samples_changes_nothing(seed, mode, options):
    spec = LossSpec(mode=mode, vocab_topk=5, **options)
    cross = options.get("aggregation") != "averaged_logits"
    teachers = [random_teacher(seed + i, B, T, V, cross=cross and i < 2, weight=0.5 + i) for i in range(3)]
    batch = random_batch(seed, B, T, V)
    before = loss_and_gradient(batch, teachers, spec)
    assert_same(before, loss_and_gradient(batch, teachers[::-1], spec))
    order = torch.tensor([2, 0, 1])
    loss, gradient, _ = loss_and_gradient(samples_of(batch, order), [part(t, order) for t in teachers], spec)
    assert_same((before[0], before[1][order]), (loss, gradient))


@few
@given(seed=seeds, factor=st.floats(0.1, 5), distribution=st.sampled_from(["mean", "first"]))
def test_unused_rows_of_the_projection_change_nothing(seed, factor, distribution):
    """p_kl: rows of W that point at no column of K, and rows beyond the student's logits, may weigh anything."""
    generator = torch.Generator().manual_seed(seed)
    batch = random_batch(seed, B, T, V)
    teacher = random_teacher(seed, B, T, V, cross=True)
    vocab = teacher.logits.shape[-1]
    logits = teacher.logits.clone()
    logits[..., vocab - 2 :] = -20  # never in K
    indices = teacher.projection.indices % (vocab - 2)
    unused = torch.rand(V, generator=generator) < 0.4
    indices = torch.where(unused[:, None], vocab - 1, torch.where(teacher.projection.indices < 0, -1, indices))
    indices = torch.cat([indices, torch.full((2, 3), 1)])
    unused = torch.cat([unused, torch.ones(2, dtype=torch.bool)])
    weights = torch.cat([teacher.projection.weights, torch.rand(2, 3, generator=generator)])
    scaled = torch.where(unused[:, None], weights * factor, weights)
    spec = kd_spec(chunk_distribution=distribution, vocab_topk=vocab - 2)
    results = [
        loss_and_gradient(batch, [replace(teacher, logits=logits, projection=Projection(indices, w, vocab))], spec)
        for w in (weights, scaled)
    ]
    assert_same(*results)


@few
@given(seed=seeds, mode=st.sampled_from(MODES))
def test_a_teacher_of_weight_zero_contributes_no_gradient(seed, mode):
    spec = LossSpec(mode=mode, dynamic_scaling=False)
    teachers = [random_teacher(seed + i, B, T, V, cross=i < 2, weight=float(i != 1)) for i in range(3)]
    batch = random_batch(seed, B, T, V)
    with_it, without = (loss_and_gradient(batch, some, spec) for some in (teachers, [teachers[0], teachers[2]]))
    assert_same(with_it, without)
    alone = distillation_loss(*batch, [replace(teachers[1], weight=1.0)], spec)
    assert float(with_it[2]["kl_loss_t1"]) == pytest.approx(float(alone.metrics["kl_loss_t0"]))  # still measured


@few
@given(
    seed=seeds,
    mode=st.sampled_from([*MODES[1:], "same"]),
    tau=st.sampled_from([0.5, 3.0]),
    reverse=st.booleans(),
    k=st.sampled_from([3, 99]),
)
def test_temperature_scaling(seed, mode, tau, reverse, k):
    """KD(z, τ) = τ² KD(z / τ, 1); not so partition_kl, which softens the sums of cells."""
    teacher = random_teacher(seed, B, T, V, cross=mode != "same")
    student, *rest = random_batch(seed, B, T, V)
    fields = {"mode": "p_kl" if mode == "same" else mode, "reverse_kl": reverse, "vocab_topk": k}
    hot = distillation_loss(student, *rest, [teacher], kd_spec(temperature=tau, **fields)).loss
    cool = distillation_loss(student / tau, *rest, [replace(teacher, logits=teacher.logits / tau)], kd_spec(**fields)).loss
    torch.testing.assert_close(hot, tau**2 * cool, rtol=1e-10, atol=1e-12)


def test_empty_batches_have_a_loss_of_zero():
    """No valid chunk, no counted token: zero, with a gradient of zeros, and a scale of 1."""
    batch = random_batch(0, B, T, V)
    batch = *batch[:3], torch.zeros(B)
    teachers = [random_teacher(i, B, T, V, cross=i < 2, mode=["gold", "p_kl", None][i]) for i in range(3)]
    for options in ({}, {"weight_metric": "ce"}, {"weight_metric": "max_prob"}):
        loss, gradient, metrics = loss_and_gradient(batch, teachers, LossSpec(mode="p_kl", **options))
        assert loss == 0
        assert gradient.abs().max() == 0
        assert metrics["kl_loss_scale"] == 1


def test_no_teachers_is_cross_entropy():
    student, ids, mask, samples = random_batch(0, B, T, V)
    out = distillation_loss(student, ids, mask, samples, [], LossSpec())
    counted = (mask[:, 1:] * samples[:, None].long()).bool()
    expected = torch.nn.functional.cross_entropy(student[:, :-1][counted], ids[:, 1:][counted])
    torch.testing.assert_close(out.loss, expected)


TOP = TopKLogits(torch.zeros(B, T, 2), torch.zeros(B, T, 2, dtype=torch.int64), V)
BAD = [
    ("mode: auto", {}, {"mode": "auto"}),
    ("exact_match_only", {"mode": "gold"}, {"exact_match_only": True}),
    ("averaged_logits", {}, {"aggregation": "averaged_logits"}),
    ("top k", {"logits": TOP}, {}),
    ("rows", {"projection": identity_projection(V - 1)}, {}),
    ("beyond", {"projection": Projection(torch.full((V, 1), 40), torch.ones(V, 1))}, {}),
    ("token_bytes", {"token_bytes": None}, {"aggregation": "select_teacher", "score_unit": "byte"}),
]


@pytest.mark.parametrize(("message", "teacher_fields", "spec_fields"), BAD, ids=[message for message, _, _ in BAD])
def test_contradictions_are_errors(message, teacher_fields, spec_fields):
    teacher = replace(random_teacher(0, B, T, V, cross=True), **teacher_fields)
    with pytest.raises(InputError, match=message):
        distillation_loss(*random_batch(0, B, T, V), [teacher], LossSpec(**{"mode": "p_kl", **spec_fields}))


def test_same_vocabulary_contradictions_are_errors():
    batch = random_batch(0, B, T, V)
    top = TeacherBatch(TOP)
    full = TeacherBatch(torch.zeros(B, T, V), weight=0.0)
    for teacher, fields, message in (
        (TeacherBatch(torch.zeros(B, T, V + 1)), {}, "columns"),
        (top, {"aggregation": "averaged_logits"}, "top k"),
        (top, {"weight_metric": "ce"}, "full logits"),
        (full, {"aggregation": "averaged_logits"}, "all are zero"),
    ):
        with pytest.raises(InputError, match=message):
            distillation_loss(*batch, [teacher], LossSpec(**fields))


def test_padded_teacher_columns_are_dropped():
    """An lm_head with more rows than its tokenizer has ids: the padding is outside the vocabulary."""
    batch = random_batch(0, B, T, V)
    teachers = [random_teacher(i, B, T, V, cross=True) for i in range(2)]
    wide = [replace(t, logits=torch.nn.functional.pad(t.logits, (0, 3), value=30.0)) for t in teachers]
    for mode in MODES:
        for options in ({"normalize_by_vocab": True}, {"weight_metric": "entropy"}):
            spec = LossSpec(mode=mode, **options)
            assert_same(loss_and_gradient(batch, teachers, spec), loss_and_gradient(batch, wide, spec))


def test_autocast_changes_nothing():
    """Reductions over chunks stay in float32 inside a bfloat16 region."""
    batch = random_batch(0, B, T, V, torch.float32)
    for mode in MODES:
        teachers = [random_teacher(0, B, T, V, cross, torch.float32) for cross in (True, False)]
        spec = LossSpec(mode=mode, weight_metric="entropy", vocab_topk=5)
        outside = loss_and_gradient(batch, teachers, spec)
        with torch.autocast("cpu", torch.bfloat16):
            inside = distillation_loss(*batch, teachers, spec).loss
        assert inside.item() == pytest.approx(outside[0].item(), rel=1e-6)
        torch.testing.assert_close(torch.autograd.grad(inside, batch[0])[0], outside[1])


def test_scores_per_byte_compare_tokenizers():
    """Of two teachers equally sure of each byte, the one with longer tokens loses per token; per byte the surer one wins."""
    batch = random_batch(0, 1, T, V)
    batch = *batch[:2], torch.ones(1, T), torch.ones(1)
    ids = torch.zeros(1, T, dtype=torch.int64)

    def teacher(nats_per_token, bytes_per_token):
        """Assigns token 0 the probability exp(-nats), everywhere."""
        rest = torch.full((1, T, V - 1), torch.tensor((1 - torch.e**-nats_per_token) / (V - 1)).log().item())
        logits = torch.cat([torch.full((1, T, 1), -nats_per_token), rest], 2)
        chunks = torch.arange(T)[None]
        every = torch.ones(1, T, dtype=torch.bool)
        token_bytes = torch.full((1, T), bytes_per_token)
        return TeacherBatch(
            logits, ids, torch.ones(1, T), chunks, chunks, every, every, identity_projection(V), token_bytes=token_bytes
        )

    short, long = teacher(1.0, 2), teacher(1.8, 4)
    for unit, selected, ratio in (("token", 0, 0.8), ("byte", 1, 1.8 / 4 - 1.0 / 2)):
        spec = LossSpec(mode="p_kl", aggregation="select_teacher", score_unit=unit)
        assert distillation_loss(*batch, [short, long], spec).metrics["selected_teacher"] == selected
        spec = LossSpec(mode="p_kl", weight_metric="ce", score_unit=unit)
        weight = distillation_loss(*batch, [short, long], spec).metrics["weight_t0"]
        assert float(weight) == pytest.approx(1 / (1 + torch.e**-ratio), rel=1e-5)
