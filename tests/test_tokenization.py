"""Token tables of real tokenizers: bytes, roles, fingerprints, normalisers."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support import assets
from tests.support.examples import examples
from xtoken_core.errors import InputError
from xtoken_core.token_hashes import HASH_BASE, hash_powers
from xtoken_core.tokenization import TokenTable, encode, load_tokenizer, normalize_for, role_pairs, row_bos
from xtoken_core.tokenizer_checks import hide_control_pieces

NAMES = ("smollm2", "qwen3", "llama2", "mistral", "gemma3", "claude", "deepseek")
HARD = (
    "Plain English, it's 2024: 3.14159 naïve cafés.\n\n",
    "def f(x):\n\treturn x != 0x1F  # tabs\tand    runs of spaces   \r\n",
    "中文分词很难，日本語のテキストも、한국어도。\u3000全角 ＡＢＣ①㎏ﬁ",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया ကမ္ဘာ",
    "👩‍👩‍👧‍👦🇯🇵👍🏽🫠 \u200b\u00a0\u2028\ufeff",
    "e\u0301 a\u0323\u0302 \u1100\u1161\u11a8 \u212b",  # what NFC and NFKC rewrite
    "▁literal ▁▁ low blocks ▁▂▃",
    "names of tokens: <s> </s> <|endoftext|> <|im_start|> <bos> <unused3> <0x0A> [INST] <tool_call>",
    " leading and trailing ",
    "   ",
    "\n",
    "",
    "\U00010000\U0010ffff\ue000\u0378",
)
TEXT = st.text(st.characters(codec="utf-8"), max_size=60) | st.lists(st.sampled_from(HARD), max_size=3).map("".join)


def spelled(name: str, text: str) -> str:
    """The text that a tokenizer's ids stand for, an added space in front taken off."""
    table = assets.table(name)
    spelling = table.decode(encode(assets.tokenizer(name), [text])[0])
    if table.dummy_prefix and len(spelling) == len(table.normalize(text).encode()) + 1:
        assert spelling[:1] == b" "
        spelling = spelling[1:]
    return spelling.decode()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", HARD)
def test_ids_spell_the_normalized_text(name: str, text: str) -> None:
    if name == "smollm2":  # its vocabulary lacks 21 bytes
        text = "".join(c for c in text if all(bytes([b]) in assets.table(name).ids_by_bytes for b in c.encode()))
    assert spelled(name, text) == assets.table(name).normalize(text)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "mistral", "llama2", "claude"])
@given(text=TEXT)
@examples(60)
def test_ids_spell_any_text(name: str, text: str) -> None:
    assert spelled(name, text) == assets.table(name).normalize(text)


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_real_tokenizers(name: str) -> None:
    table, tok = assets.table(name), assets.tokenizer(name)
    assert len(table) == len(tok)
    assert table.fingerprint == assets.SOURCES[name].fingerprint
    assert table.lengths.dtype == np.int32
    assert all(len(table[i]) == n for i, n in enumerate(table.lengths.tolist()))
    for role, i in table.roles.items():
        assert tok.convert_ids_to_tokens(i) == getattr(tok, f"{role}_token")
        assert table[i] == b"" and table.special[i]
    assert all(table[i] == token for token, i in table.ids_by_bytes.items())
    assert set(table.ids_by_bytes) == {t for i, t in enumerate(table.tokens) if not table.special[i]}


def test_equal_bytes_prefer_the_ordinary_token() -> None:
    gemma, mistral = assets.table("gemma3"), assets.table("mistral")
    for table, duplicates in ((gemma, 110), (mistral, 125)):
        text = np.flatnonzero(~table.special)
        assert len(text) - len(table.ids_by_bytes) == duplicates
        assert all(table.ordinary[table.ids_by_bytes[table[i]]] for i in text if table.ordinary[i])
    tok = assets.tokenizer("mistral")
    byte, letter = tok.convert_tokens_to_ids(["<0x61>", "a"])
    assert mistral[byte] == mistral[letter] == b"a" and mistral.ids_by_bytes[b"a"] == letter


def test_added_tokens() -> None:
    gemma, tok = assets.table("gemma3"), assets.tokenizer("gemma3")
    spaces = tok.convert_tokens_to_ids("▁▁▁▁")
    assert gemma[spaces] == b"    "
    assert gemma[tok.convert_tokens_to_ids("<unused7>")] == b"<unused7>"  # added, not special
    assert gemma[tok.convert_tokens_to_ids("<start_of_turn>")] == b""
    deepseek, tok = assets.table("deepseek"), assets.tokenizer("deepseek")
    assert deepseek[tok.convert_tokens_to_ids("<｜fim▁hole｜>")] == "<｜fim▁hole｜>".encode()  # a byte-level low block is itself


def test_rows_a_model_must_have() -> None:
    assert len(assets.table("gemma3")) == 262145 and assets.table("gemma3").min_rows == 262144
    assert assets.table("smollm2").min_rows == 49152


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_hashes_add_up_to_the_hash_of_the_text(name: str) -> None:
    table = assets.table(name)

    def of_text(tokens: list[bytes]) -> int:
        """By definition, in Python integers."""
        single = {table[i]: int(table.hashes[i]) for i in range(len(table)) if len(table[i]) == 1}
        return sum(single[bytes([b])] * pow(int(HASH_BASE), k, 2**64) for k, b in enumerate(b"".join(tokens))) % 2**64

    for ids in ([5000, 6000, 7000], [300], [9000, 300, 300, 9000]):
        starts = np.cumsum([0, *table.lengths[ids[:-1]]])
        total = sum(int(h) * int(p) for h, p in zip(table.hashes[ids], hash_powers(starts), strict=True)) % 2**64
        assert total == of_text([table[i] for i in ids])
    exponents = np.array([0, 1, 65535, 65536, 65537, 200_000])
    assert hash_powers(exponents).tolist() == [pow(int(HASH_BASE), e, 2**64) for e in exponents.tolist()]


def test_fingerprint_is_of_bytes_not_names() -> None:
    def of(vocab: dict[str, int]) -> str:
        backend = Tokenizer(models.BPE(vocab, []))
        backend.decoder = decoders.ByteLevel()
        return TokenTable.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend)).fingerprint

    assert of({"a": 0, "b": 1}) == of({"b": 1, "a": 0})
    assert len({of(v) for v in ({"a": 0, "b": 1}, {"a": 1, "b": 0}, {"ab": 0}, {"a": 0, "b": 2}, {"a": 0})}) == 5


def test_normalize_for_is_a_common_fixed_point() -> None:
    tables = [assets.table(n) for n in ("claude", "gemma3", "qwen3", "smollm2")]
    text = normalize_for("ﬁ e\u0301 ▁ ①", tables)
    assert text == "fi é   1"
    assert all(table.normalize(text) == text for table in tables)


def test_normalizers_that_undo_each_other_are_told() -> None:
    tables = []
    for normalizer in (normalizers.NFC(), normalizers.NFD()):
        backend = Tokenizer(models.BPE({"a": 0}, []))
        backend.normalizer, backend.decoder = normalizer, decoders.ByteLevel()
        tables.append(TokenTable.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend)))
    assert normalize_for("plain", tables) == "plain"
    with pytest.raises(InputError, match="undo each other on 'caf"):
        normalize_for("café", tables)


def test_a_table_does_not_depend_on_what_was_encoded_before() -> None:
    """`encode` takes special tokens' names for text from then on, which hides what comes after one."""
    backend = Tokenizer(models.Unigram([("<s>", 0.0), ("▁", -2.0), ("a", -3.0), ("▁x", -1.0), ("x", -1.5)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    before = TokenTable.from_tokenizer(tok)
    encode(tok, ["a"])
    after = TokenTable.from_tokenizer(tok)
    assert before.dummy_after_special and after.dummy_after_special


def test_normalizers_keep_only_what_changes_text() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "▁": 1}, []))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Lowercase()]), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Metaspace()
    table = TokenTable.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert table.normalize("A a") == "a a"
    assert not table.byte_level and table[1] == b" "


def test_a_unigram_model_like_t5() -> None:
    """Metaspace, a prefix only where there is no space, runs of spaces collapsed, unknown characters lost."""
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("▁a", -1.0), ("b", -3.0)], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Strip(False, True), normalizers.Replace(Regex(" {2,}"), "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    table = TokenTable.from_tokenizer(tok)
    assert table.dummy_prefix and table.normalize("a   b  ") == "a b"
    assert [table.decode(ids) for ids in encode(tok, ["a   b  ", " a", "aZb"])] == [b" a b", b" a", b" ab"]


def test_what_ends_a_turn_is_paired_before_the_roles() -> None:
    def ends(table: TokenTable, name: str) -> str | None:
        return None if table.turn_end is None else assets.tokenizer(name).convert_ids_to_tokens(table.turn_end)

    assert ends(assets.table("qwen3-chat"), "qwen3-chat") == "<|im_end|>" and assets.table("gpt2").turn_end is None
    assert ends(assets.table("deepseek-v3-chat"), "deepseek-v3-chat") == "<｜end▁of▁sentence｜>"
    tok = copy.copy(assets.tokenizer("gemma3"))  # whose EOS ends documents only
    tok.chat_template = (assets.tokenizer_folder("gemma3-chat") / "chat_template.jinja").read_text(encoding="utf-8")
    gemma, qwen = TokenTable.from_tokenizer(tok), assets.table("qwen3-chat")
    turn, eos = tok.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    assert gemma.roles["eos"] == eos and gemma.turn_end == turn
    assert role_pairs(qwen, gemma)[qwen.roles["eos"]] == turn
    assert role_pairs(gemma, qwen) == {turn: qwen.roles["eos"], eos: qwen.roles["eos"], 0: qwen.roles["pad"]}
    assert role_pairs(qwen, assets.table("gemma3"))[qwen.roles["eos"]] == eos  # without a template


def test_row_bos() -> None:
    assert row_bos(assets.tokenizer("gemma3")) == 2
    assert row_bos(assets.tokenizer("llama2")) == 1
    assert row_bos(assets.tokenizer("smollm2")) is None  # has a BOS, but does not begin texts with it
    assert row_bos(assets.tokenizer("qwen3")) is None


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="neither byte-level nor SentencePiece"):
        TokenTable.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_names_of_control_pieces_in_text_are_text() -> None:
    """A Unigram model holds its control tokens with the best score of all, and would find them in any text."""
    letters = [(letter, -4.0) for letter in "a<>s/xunk▁"]
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert any(i in (0, 1) for i in encode(tok, ["a <s>x</s>"])[0])
    hide_control_pieces(tok.backend_tokenizer, "t5")
    [ids] = encode(tok, ["a <s>x</s>"])
    assert TokenTable.from_tokenizer(tok).decode(ids) == b" a <s>x</s>" and not {0, 1, 2} & set(ids)
    assert tok("<s>", add_special_tokens=False)["input_ids"] == [0]  # where a template puts it, it is the token


def test_an_unknown_character_of_a_control_tokens_name_is_not_the_token(tmp_path) -> None:
    """A vocabulary without `<` writes it as UNK, or as a byte: the token that stands for it is no sign of its name in a text."""
    vocab = {name: i for i, name in enumerate(["<unk>", "<0x3C>", "<0x3E>", "<s>", *"aunk▁"])}
    for byte_fallback, specials in ((False, ["<unk>", "<s>"]), (True, ["<unk>", "<s>", "<0x3C>", "<0x3E>"])):
        backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=byte_fallback))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        backend.add_special_tokens(specials)
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>").save_pretrained(tmp_path)
        tok = load_tokenizer(str(tmp_path))
        table = TokenTable.from_tokenizer(tok)
        spelled = b" a<unk>" if byte_fallback else b" aunk"
        assert table.decode(encode(tok, ["a<unk>"])[0]) == spelled and table.special[tok.bos_token_id]


def test_merges_that_spell_a_control_token_are_left_out() -> None:
    vocab = {"<": 0, "s": 1, ">": 2, "s>": 3, "<s>": 4, "a": 5}
    backend = Tokenizer(models.BPE(vocab, [("s", ">"), ("<", "s>")]))
    backend.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert encode(tok, ["a<s>"]) == [[5, 4]]
    hide_control_pieces(tok.backend_tokenizer, "odd")
    assert encode(tok, ["a<s>"]) == [[5, 0, 3]]


@pytest.mark.parametrize("name", NAMES)
def test_controls_of_real_tokenizers_are_no_text(name: str) -> None:
    table, tok = assets.table(name), assets.tokenizer(name)
    names = [tok.convert_ids_to_tokens(i) for i in np.flatnonzero(table.special)[:64].tolist()]
    assert any(names)
    for ids in encode(tok, [f"a{name} b {name}" for name in names if name]):
        assert not table.special[ids].any()


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3"])
def test_a_tokenizer_without_its_merges_is_refused(name: str, tmp_path) -> None:
    folder = assets.tokenizer_folder(name)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = []
    content["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InputError, match=f"{tmp_path}: this tokenizer has lost its merges or scores: .* 0% encode to themselves"):
        load_tokenizer(str(tmp_path))


def test_saved_padding_and_truncation_change_nothing(tmp_path) -> None:
    tok = load_tokenizer(str(assets.tokenizer_folder("llama2")))
    tok.backend_tokenizer.enable_padding(direction="left", length=64, pad_id=0)
    tok.backend_tokenizer.enable_truncation(4)
    assert TokenTable.from_tokenizer(tok).dummy_prefix and tok.backend_tokenizer.padding["length"] == 64
    tok.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}')
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.backend_tokenizer.padding is None and loaded.backend_tokenizer.truncation is None
    assert encode(loaded, ["some words of a text"]) == encode(assets.tokenizer("llama2"), ["some words of a text"])
    assert row_bos(loaded) == 1


def test_tokens_that_end_words_with_a_mark_are_refused() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.ByteLevel()
    with pytest.raises(InputError, match="end_of_word_suffix '</w>', which is not text"):
        TokenTable.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_load_tokenizer(tmp_path) -> None:
    folder = assets.tokenizer_folder("qwen3")
    assert len(load_tokenizer("unused", str(folder))) == 151669
    (tmp_path / "tokenizer.json").write_text("{")
    for bad in (tmp_path, tmp_path / "none", tmp_path / "none.gguf"):
        with pytest.raises(InputError, match=str(bad)) as caught:
            load_tokenizer(str(bad))
        assert "\n" not in str(caught.value)
