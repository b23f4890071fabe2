"""The student that a training leaves: its source's dtype and configs, adapters merged, and adapters that resume."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.support.training_run import FIVE_STEPS, changed, losses, prepare, run
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec
from xtoken_core.tokenization import load_tokenizer
from xtoken_core.training.student import student_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("saving")


@pytest.fixture(scope="module")
def values(base):
    """A tiny run whose student lies in bfloat16, with a generation config and a chat template of its own."""
    spec = prepare(base, teachers=1, training=FIVE_STEPS)
    model = AutoModelForCausalLM.from_pretrained(base / "student", dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=1)
    model.save_pretrained(base / "student")
    tokenizer = load_tokenizer(str(base / "student"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(base / "student")
    return spec


@pytest.fixture(scope="module")
def adapted(base, values):
    spec = changed(values, student={**values["student"], "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}})
    out = base / "adapted"
    return spec, out, run(spec, base, out)


def test_the_seed_decides_what_adapters_begin_with(values):
    """Whatever the process has drawn before."""

    def first_weights(seed):
        torch.rand(3)
        spec = changed(values, student={**values["student"], "lora": {"rank": 2}}, training={"seed": seed})
        model = student_model(DistillationSpec.model_validate(spec), None)
        return torch.cat([weight.flatten() for name, weight in model.named_parameters() if "lora_A" in name])

    assert torch.equal(first_weights(1), first_weights(1)) and not torch.equal(first_weights(1), first_weights(2))


def test_a_student_is_stored_as_its_source_was(base, values):
    out = base / "whole"
    run(changed(values, training={**FIVE_STEPS, "max_steps": 1, "eval_steps": 1, "save_steps": 1}), base, out)
    for folder in (out / "best", out / "last"):
        with safe_open(folder / "model.safetensors", "pt") as stored:
            assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.bfloat16}  # noqa: SIM118 - no mapping
            assert "lm_head.weight" not in stored.keys()  # noqa: SIM118 - tied: once
        config, before = (json.loads((place / "config.json").read_text()) for place in (folder, base / "student"))
        assert config.pop("transformers_version") and before.pop("transformers_version") and config == before
        assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.7
        assert load_tokenizer(str(folder)).chat_template
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.dtype == torch.bfloat16
        assert loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
    kept = load_checkpoint(out / "checkpoints" / "checkpoint-1")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


def load_checkpoint(folder):
    with safe_open(folder / "model.safetensors", "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping


def test_adapters_are_merged_and_kept(base, adapted):
    _, out, summary = adapted
    assert summary.trainable_parameters < summary.parameters / 5
    merged = AutoModelForCausalLM.from_pretrained(out / "last", dtype=torch.float32)
    source = AutoModelForCausalLM.from_pretrained(base / "student", dtype=torch.float32)
    ids = torch.arange(2, 40)[None]
    before = source(ids).logits
    beside = PeftModel.from_pretrained(source, out / "last" / "adapters")(ids).logits
    changed_by, apart = (merged(ids).logits - before).abs().max(), (merged(ids).logits - beside).abs().max()
    assert apart < 0.1 * changed_by, "merged weights are stored in bfloat16, adapters in float32"
    untouched = dict(source.named_parameters())["model.embed_tokens.weight"]
    assert torch.equal(dict(merged.named_parameters())["model.embed_tokens.weight"], untouched)


def test_adapters_resume_to_the_same_bits(base, adapted):
    spec, out, _ = adapted
    again = base / "resumed"
    shutil.copytree(out / "checkpoints", again / "checkpoints")
    shutil.rmtree(again / "checkpoints" / "checkpoint-5", ignore_errors=True)
    assert not list((again / "checkpoints").glob("*/model.safetensors")), "a checkpoint holds the adapters only"
    summary = run(spec, base, again)
    assert summary.resumed_from == 4 and losses(again)[-1] == losses(out)[-1]


def test_targets_that_the_model_lacks_are_one_line(base, values):
    spec = changed(values, student={**values["student"], "lora": {"targets": ["no_such_layer"]}})
    with pytest.raises(InputError, match="student.lora.targets: .*no_such_layer"):
        run(spec, base, base / "none")


def test_the_spec_refuses_what_adapters_cannot_do():
    spec = {
        "name": "a",
        "student": {"model": "m", "lora": {"targets": ["lm_head"]}},
        "teachers": [{"id": "t", "model": "m"}],
        "data": {"train": ["t"]},
        "training": {"sharding": "fsdp"},
        "output": {"uri": "o"},
    }
    with pytest.raises(InputError, match="student.lora.targets: lm_head"):
        DistillationSpec.from_text(json.dumps(spec))
    spec["student"]["lora"] = {}
    with pytest.raises(InputError, match="student.lora: trains with sharding: ddp"):
        DistillationSpec.from_text(json.dumps(spec))
