"""What config.json tells is found before any weight is read, as one line that names the model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.support.architectures import SIZES, tiny_config
from xtoken_core.configs import empty_model, positions, read_config
from xtoken_core.errors import InputError
from xtoken_core.layers import prune_layers
from xtoken_core.models import load_model

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ADAPTED = VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
IDS = torch.tensor([[5, 7, 9]])


def config_file(folder, **changes):
    """A Llama's config.json with some keys changed; None takes a key out."""
    told = json.loads(tiny_config("llama").to_json_string(use_diff=False)) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000"),
        ({"num_hidden_layers": "two"}, ""),
        ({"num_attention_heads": 3, "head_dim": 8}, ""),
        ({"num_key_value_heads": 0}, "num_attention_heads: 2 do not divide over 0"),
        ({"hidden_size": 0}, "has no elements"),
        ({"hidden_size": -8}, ""),
        ({"vocab_size": 0}, ""),
        ({"vocab_size": None, "model_type": "no-such-type"}, ""),
        ({"model_type": "mistral3"}, "mistral3 is not a causal language model"),
        ({"hidden_act": "no-such-function"}, ""),
        ({"rope_parameters": {"rope_type": "no-such-type", "rope_theta": 1e4}}, ""),
        ({"quantization_config": "gptq"}, "quantization_config names no quant_method"),
        ({"quantization_config": {}}, "quantization_config names no quant_method"),
        ({"quantization_config": {"quant_method": "no-such-method"}}, r"quantised \(no-such-method\); give the unquantised"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\); give the unquantised"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
            r"code of its own \(auto_map\), and such code is never",
        ),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_model_is_one_line(changes, reason, tmp_path):
    folder = config_file(tmp_path, **changes)
    with pytest.raises(InputError, match=rf"^{folder}: cannot load the model: [^\n]*{reason}[^\n]*$"):
        empty_model(folder, read_config(folder))


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder = config_file(tmp_path, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (tmp_path / "own.py").write_text("raise SystemExit('run')")
    assert type(empty_model(folder, read_config(folder))).__name__ == "LlamaForCausalLM"  # the library has the architecture


def test_an_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    for _ in range(2):
        with pytest.raises(InputError, match=f"^{tmp_path}: cannot load the model: it is a LoRA adapter; merge it"):
            load_model(str(tmp_path))
        config_file(tmp_path)


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, 64),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, 256),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}},
            64,
        ),
    ],
    ids=str,
)
def test_positions(changes, bound, tmp_path):
    assert positions(read_config(config_file(tmp_path, **changes))) == bound


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama4", {"text_config": SIZES["llama4_text"], "vision_config": ADAPTED}),
        ("gemma3", {"text_config": SIZES["gemma3_text"], "vision_config": VISION, "mm_tokens_per_image": 4}),
    ],
)
def test_the_language_model_of_a_vision_wrapper_loads_and_is_pruned(kind, config, tmp_path):
    AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **config)).save_pretrained(tmp_path / "whole")
    pruned = prune_layers(load_model(str(tmp_path / "whole")), [0, 2])
    pruned.save_pretrained(tmp_path / "pruned")
    again = load_model(str(tmp_path / "pruned"))
    with torch.no_grad():
        torch.testing.assert_close(again(IDS, use_cache=False).logits, pruned(IDS, use_cache=False).logits)


def test_weights_in_fp8_become_plain_ones(tmp_path):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config("llama"))
    plain.save_pretrained(tmp_path)
    stored = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        stored[name] = weight
        if "proj" in name:
            blocks = weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
            scale = blocks.abs().amax((1, 3)) / 448
            stored[name] = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    config_file(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    model = load_model(str(tmp_path))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=0.1, atol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
