"""Teachers by domain: a teacher counts on the rows of its domains only, by denominators of the whole step."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch

from tests.support.losses_cases import random_batch, random_teacher
from tests.support.training_run import FIVE_STEPS, losses, prepare, run, steps
from xtoken_core.data.batch import Collator
from xtoken_core.data.reading import load_rows
from xtoken_core.data.statistics import statistics_of
from xtoken_core.errors import InputError
from xtoken_core.losses import distillation_loss, reference
from xtoken_core.report.run import Run
from xtoken_core.report.taught import taught_table
from xtoken_core.spec import DistillationSpec, LossSpec
from xtoken_core.teachers import scoring
from xtoken_core.training.distill import distill
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.workflow.scoring import score_teacher
from xtoken_core.workflow.views import View, view


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("domains")


@pytest.fixture(scope="module")
def values(base):
    """Two parts, `code` and one without a name; two teachers."""
    (base / "code").mkdir()
    (base / "code" / "0.txt").write_text("def f(x):\n    return x + 1\n" * 30)
    spec = {"data": {"train": [str(base / "train"), {"uri": str(base / "code"), "domain": "code"}]}}
    return prepare(base, training=FIVE_STEPS, loss={"dynamic_scaling": False}, **spec)


def with_domains(values, *domains):
    teachers = [t | ({} if d is None else {"domains": d}) for t, d in zip(values["teachers"], domains, strict=True)]
    return values | {"teachers": teachers}


def test_the_samples_of_a_domain_are_known(base, values):
    rows = load_rows(base / "rows" / "train")
    spec = DistillationSpec.model_validate(with_domains(values, ["code"], None))
    batch = Collator.for_rows(spec, base / "rows" / "train")([rows[i] for i in range(len(rows))])
    assert batch.taught[1] is None
    assert batch.taught[0].tolist() == [row["domain"] == "code" for row in rows] and 0 < batch.taught[0].sum() < len(rows)


@pytest.mark.parametrize("packing", [False, True])
def test_a_teacher_reads_its_rows_only(base, values, packing):
    """Of the others nothing, of none one token; what comes back lies where the loss looks for it."""
    rows = load_rows(base / "rows" / "train")
    of = {flag: [rows[i] for i in range(len(rows)) if (rows[i]["domain"] == "code") == flag][:3] for flag in (True, False)}
    mixed = [of[False][0], of[True][0], of[False][1], of[True][1]]
    spec = DistillationSpec.model_validate(with_domains(values, ["code"], ["code"]))
    collate = Collator.for_rows(spec, base / "rows" / "train")
    for documents, read in ((mixed, [1, 3]), (of[False][:2], []), (of[True][:2], [0, 1])):
        batch = (
            collate([documents[:2], documents[2:]] if packing else documents)
            if len(documents) == 4 or not packing
            else collate([documents])
        )
        for side, column in zip(batch.teachers, ("teacher_other", "student")):
            ids = side.model_inputs()["input_ids"]
            lengths = [len(documents[i][f"{column}_ids"]) for i in read]
            assert ids.numel() <= (len(lengths) * max(lengths) if lengths else 1)
            assert ("position_ids" in side.model_inputs()) == packing
            back = side.unpacked(ids)
            assert back.shape == side.input_ids.shape
            for i in read:
                assert torch.equal(back[i] * side.attention_mask[i], side.input_ids[i] * side.attention_mask[i])


@pytest.mark.parametrize("packing", [False, True])
def test_what_a_teacher_does_not_read_changes_nothing(base, values, tmp_path, packing):
    """The losses are those of a teacher that runs over all rows and counts on its own."""
    given = with_domains(values, ["code"], ["code"])
    given["data"] = given["data"] | {"packing": packing}
    run(given, base, tmp_path / "own")
    with mock.patch.object(Collator, "_of_domain", lambda self, side, *_: side):
        run(given, base, tmp_path / "all")
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "own")), torch.tensor(losses(tmp_path / "all")), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("teacher", ["same", "other"])
def test_of_scores_too(base, values, tmp_path, teacher, monkeypatch):
    """A teacher is scored on its rows only, and a training reads what one beside the running teacher hears."""
    monkeypatch.setattr(scoring, "PART_ROWS", 2)  # some parts have no row of the domain
    given = with_domains(values, ["code"], ["code"])
    given |= {"teachers": [t for t in given["teachers"] if t["id"] == teacher], "loss": given["loss"] | {"mode": "partition_kl"}}
    scored = given | {"teachers": [given["teachers"][0] | {"scores": {"top_k": 400}}]}
    spec = DistillationSpec.model_validate(scored)
    rows = load_rows(base / "rows" / "train")
    column = "teacher_other_ids" if teacher == "other" else "student_ids"
    expected = sum(len(row[column]) for row in map(rows.__getitem__, range(len(rows))) if row["domain"] == "code")
    assert score_teacher(spec, teacher, base / "rows", tmp_path / "scores") == expected
    w = {"other": base / "w.safetensors"}
    distill(DistillationSpec.model_validate(given), TrainingInputs((base / "rows",), {}, w), tmp_path / "live")
    distill(spec, TrainingInputs((base / "rows",), {}, w, {teacher: (tmp_path / "scores",)}), tmp_path / "read")
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "read")), torch.tensor(losses(tmp_path / "live")), rtol=1e-4, atol=1e-5
    )
    everywhere = scored | {"teachers": [{k: v for k, v in scored["teachers"][0].items() if k != "domains"}]}
    with pytest.raises(InputError, match="made of the domains code only"):
        distill(
            DistillationSpec.model_validate(everywhere),
            TrainingInputs((base / "rows",), {}, w, {teacher: (tmp_path / "scores",)}),
            tmp_path / "out",
        )


def test_the_twin_of_a_run_with_domains_trains(base, values, tmp_path):
    """On cross-entropy alone, and on all rows; by the whole spec, and by the part of it that its step is given."""
    spec = DistillationSpec.model_validate(with_domains(values, ["code"], None))
    for number, given in enumerate((spec, View.from_text(view(spec, "baseline").to_json()))):
        distill(given, TrainingInputs((base / "rows",)), tmp_path / str(number), baseline=True)
    found = [losses(tmp_path / str(number)) for number in (0, 1)]
    assert found[0] == found[1] and len(found[0]) == 5


def test_the_report_tells_who_taught_what(base, values, tmp_path):
    given = with_domains(values, ["code"], None)
    run(given, base, tmp_path / "out")
    stats = statistics_of(str(base / "rows" / "train"))
    spec = DistillationSpec.model_validate(given)
    table = taught_table(Run.collect(spec, tmp_path / "out", prepare={"train": stats}))
    found = {row[0].text: [cell.text for cell in row] for row in table.rows}
    assert found["other"][1:3] == ["code", str(stats.domains["code"])] and found["same"][1:3] == ["all", str(stats.rows)]
    chunks = sum(line["teachers"]["other"]["chunks"] for line in steps(tmp_path / "out"))
    assert found["other"][3] == f"{chunks:,.0f}" and float(found["other"][4]) > 0
    told = Run.collect(spec, tmp_path / "out", prepare={"train": stats})
    first = next(line for line in told.log if line.of_training)
    sparse = taught_table(told.model_copy(update={"log": [first]}))
    assert sparse.rows[0][3].text == f"{told.summary.steps * first.teachers['other'].chunks:,.0f}"
    assert taught_table(Run.collect(DistillationSpec.model_validate(values), tmp_path / "out")) is None


@pytest.mark.parametrize("micro", [1, 4])
def test_a_teacher_counts_on_its_rows_only(base, values, tmp_path, micro):
    given = with_domains(values, ["code"], ["code"])
    given["training"] = given["training"] | {"micro_batch_size": micro}
    run(given, base, tmp_path / "code")
    run(with_domains(values, None, None), base, tmp_path / "all")
    chunks = [[line["teachers"]["other"]["chunks"] for line in steps(tmp_path / name)] for name in ("code", "all")]
    assert 0 < sum(chunks[0]) < sum(chunks[1]) and all(few <= many for few, many in zip(*chunks))
    if micro == 1:
        return
    run(with_domains(values, ["code"], ["code"]), base, tmp_path / "split")
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "split")), torch.tensor(losses(tmp_path / "code")), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("topk", [4, 8192])
def test_a_teacher_of_the_same_vocabulary_with_a_mask_of_its_own(topk):
    """Its KD is the mean over its tokens; CE is over all."""
    logits, ids, mask, samples = random_batch(3, 4, 7, 9)
    spec = LossSpec(mode="p_kl", vocab_topk=topk, dynamic_scaling=False, kd_course="constant")
    teacher = random_teacher(5, 4, 7, 9, cross=False)
    taught = torch.tensor([1, 0, 1, 0])
    own = type(teacher)(logits=teacher.logits, token_mask=mask * taught[:, None])
    found = distillation_loss(logits, ids, mask, samples, [own], spec)
    expected = reference.distillation_loss(logits, ids, mask, samples, [own], spec)
    alone = distillation_loss(logits, ids, mask, samples * taught, [type(teacher)(logits=teacher.logits)], spec)
    whole = distillation_loss(logits, ids, mask, samples, [], spec)
    assert float(found.metrics["kl_loss_t0"]) == pytest.approx(float(alone.metrics["kl_loss_t0"]))
    assert float(found.metrics["ce_loss"]) == pytest.approx(float(whole.metrics["ce_loss"]))
    torch.testing.assert_close(found.loss, expected.loss.to(found.loss.dtype))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "domains: maths is not the domain of a part of data.train"),
        ({"loss": {"aggregation": "select_teacher"}}, "domains: serve aggregation: sum with fixed weights only"),
    ],
)
def test_a_domain_that_cannot_be_taught_is_refused_by_name(values, sections, message):
    with pytest.raises(InputError) as caught:
        DistillationSpec.from_text(json.dumps(with_domains(values, ["maths"], None) | sections))
    assert message in str(caught.value)
