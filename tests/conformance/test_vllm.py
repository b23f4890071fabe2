"""The saved student under vLLM: its own check of a config where it is installed, the names of what it serves anywhere."""

import json
from pathlib import Path

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.support.architectures import SIZES, tiny_config
from tests.support.training_run import prepare, run

SERVED = set(json.loads((Path(__file__).parents[1] / "support" / "schemas" / "vllm_architectures.json").read_text()))
NOT_SERVED = {"mpt"}
"""What vLLM has dropped."""


@pytest.mark.parametrize("kind", SIZES)
def test_every_architecture_is_served_but_what_vllm_has_dropped(kind):
    assert (MODEL_FOR_CAUSAL_LM_MAPPING[type(tiny_config(kind))].__name__ in SERVED) != (kind in NOT_SERVED)


@pytest.mark.slow
def test_its_config_check_takes_the_student_that_a_training_has_saved(tmp_path):
    config = pytest.importorskip("vllm.config.model", reason="needs vllm, 0.4 GB with a torch of its own: pip install vllm")
    values = prepare(tmp_path, teachers=1, student={"keep_layers": 1})
    run(values, tmp_path, tmp_path / "run")
    folder = str(tmp_path / "run" / "last")
    found = config.ModelConfig(model=folder, tokenizer=folder)
    assert (found.architecture, found.runner_type, found.max_model_len) == ("LlamaForCausalLM", "generate", 2048)
    assert found.hf_text_config.num_hidden_layers == 1 and found.get_vocab_size() == 400
