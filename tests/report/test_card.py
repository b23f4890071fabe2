"""The model card: a hub can read its front matter, every model's licence is named, and what it asks."""

import pytest
import yaml

from pipelines.demo_models import DEMO_MODELS
from tests.support.report_sample import parts
from xtoken_core.report.card import ASKED, model_card
from xtoken_core.report.run import Run
from xtoken_core.results.workflow import ReadInput
from xtoken_core.workflow.licences import licence_of


@pytest.fixture
def run(tmp_path) -> Run:
    inputs = [
        ReadInput(field="student.model", uri="/home/me/models/SmolLM2", version="a1", licence="apache-2.0"),
        ReadInput(field="teachers.gemma.model", uri="google/gemma-3-270m", version="b2", licence="gemma"),
        ReadInput(field="teachers.llama.model", uri="meta-llama/Llama-3.2-3B", version="c3", licence="llama3.2"),
        ReadInput(field="teachers.own.model", uri="s3://models/own", version="d4"),
        ReadInput(field="data.train", uri="text.jsonl", version="e5"),
    ]
    return Run.collect(**(parts(tmp_path) | {"inputs": inputs}))


def test_a_card_names_everything_a_user_needs(run):
    card = model_card(run, "best")
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["base_model"] == run.spec["student"]["model"]
    assert front["base_model_relation"] == "finetune" and front["library_name"] == "transformers"
    assert "Gemma Terms of Use" in card and "Built with Llama" in card
    assert "teachers.own.model: its card names no licence" in card
    assert "AutoModelForCausalLM.from_pretrained" in card and "vllm serve" in card
    assert "/home/me" not in card and "models/SmolLM2" in card
    assert f"{run.after.bits_per_byte.total:.3f}" in card and "95 % interval" in card
    assert yaml.safe_load(card.split("## Spec\n\n```yaml\n")[1].split("```")[0]) == run.settings


@pytest.mark.parametrize("model", DEMO_MODELS, ids=lambda model: model.folder)
def test_the_demo_models_tell_their_licences(model, tmp_path):
    (tmp_path / "README.md").write_text(model.card)
    assert licence_of(str(tmp_path)) == model.licence in ASKED and model.notice in model.card


def test_a_licence_is_read_off_a_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: gemma\n---\nlicense: mit\n")
    assert licence_of(str(tmp_path)) == "gemma"
    (tmp_path / "README.md").write_text("no front matter\nlicense: mit\n")
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "empty").mkdir()
    assert licence_of(str(tmp_path / "empty")) is None and licence_of("s3://bucket/model") is None
