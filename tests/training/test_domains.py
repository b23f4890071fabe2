"""Teachers by domain: a teacher counts on the rows of its domains only, by denominators of the whole step."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support.losses_cases import random_batch, random_teacher
from tests.support.training_run import FIVE_STEPS, losses, prepare, run, steps
from xtoken_core.data.batch import Collator
from xtoken_core.data.reading import load_rows
from xtoken_core.errors import InputError
from xtoken_core.losses import distillation_loss, reference
from xtoken_core.spec import DistillationSpec, LossSpec


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
