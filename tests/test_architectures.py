"""Every architecture that is promised: loaded tiny, and pruned to a model that loads again as what it was."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from tests.support.architectures import SIZES, tiny_config
from xtoken_core.configs import positions, read_config
from xtoken_core.errors import InputError
from xtoken_core.layers import decoder_layers, prune_layers
from xtoken_core.models import load_model

IDS = torch.tensor([[5, 7, 9, 11, 2, 40]])
WITHOUT_SDPA = {"bloom", "mpt", "gpt_oss"}
if Version(transformers.__version__) >= Version("5.21"):
    WITHOUT_SDPA |= {"gemma2"}


@pytest.fixture(scope="module", params=SIZES)
def saved(request, tmp_path_factory):
    """The kind and the folder of a random model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(tiny_config(request.param)).save_pretrained(folder)
    return request.param, str(folder)


def test_it_loads_with_the_attention_that_it_has(saved, caplog):
    kind, folder = saved
    with caplog.at_level("INFO"):
        model = load_model(folder)
    attention = "eager" if kind in WITHOUT_SDPA else "sdpa"
    assert model.config._attn_implementation == attention and f"{folder}: attention: {attention}" in caplog.text
    assert positions(read_config(folder)) == {"bloom": None, "gpt_oss": 32 * 4096}.get(kind, 64)
    if kind in WITHOUT_SDPA:
        with pytest.raises(InputError, match=rf"^training\.attention: {folder} \(.*ForCausalLM\) has no sdpa"):
            load_model(folder, attention="sdpa")


@pytest.mark.parametrize("keep", [[0, 1, 3], [1, 2], [0, 2], [2, 3], [0]], ids=str)
def test_a_pruned_one_loads_again_as_what_it_was_or_is_refused(saved, keep, tmp_path):
    kind, folder = saved
    model = load_model(folder)
    if kind == "gemma3n_text":
        with pytest.raises(InputError, match=r"^student\.keep_layers: Gemma3nForCausalLM cannot be pruned so: "):
            prune_layers(model, keep)
        return
    pruned = prune_layers(model, keep)
    pruned.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert len(decoder_layers(again)) == len(keep)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS, use_cache=False).logits, pruned(IDS, use_cache=False).logits)
