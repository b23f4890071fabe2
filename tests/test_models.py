"""Models: loading, depth pruning, the lm_head taken apart."""

from __future__ import annotations

import json

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    NemotronConfig,
    OPTConfig,
    PhiConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

from tests.support.tiny import tiny_model
from xtoken_core.configs import head_rows, one_line, weight_bytes
from xtoken_core.errors import InputError
from xtoken_core.layers import decoder_layers, first_layers, prune_layers
from xtoken_core.models import check_head, final_hidden, head_logits, load_model, save_model, vocabulary_rows
from xtoken_core.spec import DistillationSpec
from xtoken_core.training.student import student_model

OPT = OPTConfig(vocab_size=60, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32)
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def random_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        Gemma2Config(**SIZES, final_logit_softcapping=2.0),
        GraniteConfig(**SIZES, logits_scaling=8.0),
        CohereConfig(**SIZES, logit_scale=0.1, pad_token_id=0),
        PhiConfig(**SIZES),  # has a bias
        NemotronConfig(**SIZES),
    ],
    ids=lambda config: config.model_type,
)
def test_head_gives_the_models_own_logits(config):
    model = random_model(config)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    ids = torch.randint(0, 60, (2, 7))
    check_head(model, "teacher")
    with torch.no_grad():
        ours = head_logits(model, final_hidden(model, ids), 50).dense()
        torch.testing.assert_close(ours, model(ids).logits[..., :50])


def test_a_head_of_another_form_is_refused():
    model = random_model(LlamaConfig(**SIZES))
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output**3)
    with pytest.raises(InputError, match=r"teachers\.0 \(odd\): LlamaForCausalLM"):
        check_head(model, "teachers.0 (odd)")


def _saved(config, folder):
    random_model(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "config",
    [
        FalconH1Config(**SIZES, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, lm_head_multiplier=0.5),
        RecurrentGemmaConfig(**SIZES, lru_width=32, logits_soft_cap=0.1),
    ],
    ids=lambda config: config.model_type,
)
def test_a_head_of_another_form_does_not_load(tmp_path, config):
    with pytest.raises(InputError, match=f"^{tmp_path}: .*ForCausalLM does more after its final hidden states"):
        load_model(_saved(config, tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=8),
        Qwen3NextConfig(
            **SIZES,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        OPT,
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_mixes_packed_documents_does_not_load_for_them(tmp_path, config, dtype):
    folder = _saved(config, tmp_path)
    load_model(folder, dtype, "eager")
    with pytest.raises(
        InputError, match=rf"^{tmp_path}: data\.packing: .*ForCausalLM does not keep the documents of a row apart"
    ):
        load_model(folder, dtype, "eager", packed=True)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"micro_batch_size": 2}, r"training\.micro_batch_size: data\.packing with flash_attention_2 needs 1"),
        ({"precision": "fp32"}, r"training\.precision: fp32 has no flash_attention_2"),
    ],
)
def test_flash_attention_is_refused_where_it_would_mix_documents_or_not_run(training, message):
    spec = {"name": "s", "student": {"model": "s"}, "teachers": [{"id": "t", "model": "t"}], "output": {"uri": "o"}}
    spec |= {"data": {"train": ["t"], "packing": True}, "training": {"attention": "flash_attention_2"}}
    DistillationSpec.from_text(json.dumps(spec))
    with pytest.raises(InputError, match=f"^spec: {message}$"):
        DistillationSpec.from_text(json.dumps(spec | {"training": spec["training"] | training}))


def test_a_packed_runs_student_is_checked_for_it(tmp_path):
    spec = {"name": "s", "student": {"model": _saved(OPT, tmp_path)}, "teachers": [{"id": "t", "model": "t"}]}
    spec |= {"data": {"train": ["t"], "packing": True}, "output": {"uri": "o"}}
    with pytest.raises(InputError, match=rf"^{tmp_path}: data\.packing: OPTForCausalLM"):
        student_model(DistillationSpec.model_validate(spec), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES), MixtralConfig(**SIZES, num_local_experts=4)],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_keeps_packed_documents_apart_loads(tmp_path, config, dtype, attention):
    model = load_model(_saved(config, tmp_path), dtype, attention, packed=True)
    assert model.config._attn_implementation == attention


def test_padding_behind_a_row_changes_nothing_in_it():
    model = random_model(LlamaConfig(**SIZES))
    row = torch.randint(0, 60, (1, 5))
    padded = torch.cat([row, torch.zeros(1, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        torch.testing.assert_close(final_hidden(model, padded)[:, :5], final_hidden(model, row))


def test_packed_documents_do_not_see_each_other():
    model = random_model(LlamaConfig(**SIZES))
    a, b = torch.randint(0, 60, (1, 5)), torch.randint(0, 60, (1, 4))
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    with torch.no_grad():
        packed = final_hidden(model, torch.cat([a, b], 1), positions)
        torch.testing.assert_close(packed[:, :5], final_hidden(model, a))
        torch.testing.assert_close(packed[:, 5:], final_hidden(model, b))


@pytest.mark.parametrize(("keep", "expected"), [(1, [0]), (2, [0, 5]), (3, [0, 2, 5]), ([0, 1, 4], [0, 1, 4]), (6, range(6))])
def test_prune_keeps_the_layers_asked_for(keep, expected):
    model = random_model(Gemma2Config(**SIZES))
    layers, types = list(decoder_layers(model)), model.config.layer_types
    prune_layers(model, keep)
    assert list(decoder_layers(model)) == [layers[i] for i in expected]
    assert model.config.layer_types == [types[i] for i in expected]
    assert model.config.num_hidden_layers == len(expected)


@pytest.mark.parametrize(("keep", "message"), [(7, "7 layers asked for, the model has 6"), ([0, 6], "no layer 6")])
def test_prune_names_layers_that_are_not_there(keep, message):
    with pytest.raises(InputError, match=f"student.keep_layers: {message}"):
        prune_layers(random_model(LlamaConfig(**SIZES)), keep)


def test_a_pruned_model_survives_saving_and_generates(tmp_path):
    folder = tiny_model(tmp_path / "whole", 300)
    model = prune_layers(load_model(str(folder)), [1])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    save_model(model, tokenizer, tmp_path / "pruned")
    again = load_model(str(tmp_path / "pruned"))
    ids = torch.tensor([tokenizer("In the beginning").input_ids])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3  # the cache has one layer


def test_rows_of_padding_are_dropped_and_missing_onesone_line():
    model = random_model(LlamaConfig(**SIZES))
    assert vocabulary_rows(model, num_ids=55, min_rows=55, who="t") == 55
    assert vocabulary_rows(model, num_ids=61, min_rows=60, who="t") == 60  # the last id is special and has no row
    with pytest.raises(InputError, match=r"teachers\.1 \(x\): its lm_head has 60 rows, fewer than the 61 ids"):
        vocabulary_rows(model, num_ids=61, min_rows=61, who="teachers.1 (x)")


@pytest.mark.parametrize("ref", ["/no/such/folder", "no/such/deep/folder", "missing.gguf/x/y"])
def test_what_is_missing_isone_line(ref):
    for load in (load_model, head_rows):
        with pytest.raises(InputError, match=f"^{ref}: cannot load the model: no such file or folder$"):
            load(ref)


def test_a_folder_without_a_model_isone_line(tmp_path):
    with pytest.raises(InputError, match="cannot load the model"):
        load_model(str(tmp_path))


def _edit(folder, change):
    """Rewrites a saved model's weights."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop("model.norm.weight"), r"weights missing: model\.norm\.weight"),
        (
            lambda w: [w.pop(name) for name in list(w) if "layers.1.self_attn" in name],
            r"weights missing: model\.layers\.1\.self_attn\.k_proj\.weight and 3 more",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(3)}),
            r"weights of another shape: model\.norm\.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_areone_line(tmp_path, change, reason):
    folder = tiny_model(tmp_path, 300)
    _edit(folder, change)
    with pytest.raises(InputError, match=f"^{folder}: cannot load the model: {reason}$"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "spoil",
    [lambda weights: weights[:20000], lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"],
    ids=["truncated", "LFS pointer"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_cannot_be_read_are_one_line(tmp_path, spoil, name):
    folder = tiny_model(tmp_path, 300)
    weights = folder / "model.safetensors"
    if name == "pytorch_model.bin":
        torch.save(load_file(weights), folder / name)
        weights.unlink()
    (folder / name).write_bytes(spoil((folder / name).read_bytes()))
    with pytest.raises(InputError, match=f"^{folder}: cannot load the model: [^\n]+$"):
        load_model(str(folder))


def test_a_configuration_that_makes_no_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    for load in (load_model, lambda ref: weight_bytes(ref, torch.float32)):
        with pytest.raises(InputError, match=f"^{tmp_path}: cannot load the model: [^\n]+$"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "expected"), [(torch.OutOfMemoryError("full"), torch.OutOfMemoryError), (OSError(), InputError)]
)
def test_running_out_of_memory_is_no_bad_input_and_an_error_may_be_silent(error, expected):
    with pytest.raises(expected, match="full|^m: cannot load the model: OSError$"), one_line("m"):
        raise error


def test_gguf_loads_as_a_plain_model_that_can_be_saved(tmp_path):
    source = random_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}, tie_word_embeddings=False))
    path = tmp_path / "model.gguf"
    _write_gguf(path, source)
    model = load_model(str(path))
    ids = torch.arange(6)[None]
    torch.testing.assert_close(model(ids).logits, source(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(str(tmp_path / "saved"))(ids).logits, model(ids).logits)
    assert load_model(f"file://{path}").dtype == torch.float32


def _write_gguf(path, model):
    """The parts of a llama GGUF that transformers reads, weights in float32."""
    config, heads = model.config, SIZES["num_attention_heads"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(SIZES["head_dim"])
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            name = f"blk.{layer}.{names[part]}.weight"
            if part in ("self_attn.q_proj", "self_attn.k_proj"):  # GGUF interleaves the halves of a rotary pair
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        else:
            name = f"{names[stem]}.weight"
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_first_layers_hold_one_of_every_kind_and_all_come_back():
    config = Qwen3NextConfig(
        num_hidden_layers=8, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8, vocab_size=50,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    before = list(decoder_layers(model))
    with first_layers(model):
        assert config.layer_types[:4] == ["linear_attention"] * 3 + ["full_attention"]
        assert list(model.model.layers) == before[:4]
    assert list(decoder_layers(model)) == before
