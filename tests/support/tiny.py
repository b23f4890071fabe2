"""Models of a few kilobytes, with byte-level BPE tokenizers trained on the demo's text, for tests of the plumbing."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = Path(__file__).parents[2] / "pipelines" / "specs" / "demo_text"


def texts(limit: int = 20) -> list[str]:
    """Some documents of the demo."""
    return [json.loads(line)["text"] for line in (TEXTS / "train.jsonl").read_text().splitlines()[:limit]]


def tiny_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with every byte, and `<bos>`, `<eos>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


def tiny_model(folder: Path, vocab_size: int, seed: int = 0, **sizes: int) -> Path:
    """Writes a random Llama of 2 layers and 32 dimensions, or of other sizes, with its tokenizer, to `folder`."""
    tokenizer = tiny_tokenizer(vocab_size)
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 2048} | heads
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(tiny | sizes),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_run(folder: Path, teachers: int = 2) -> dict:
    """A spec, as a dict, of a run of seconds: a student, a teacher of another vocabulary, a teacher of the same one."""
    student = tiny_model(folder / "student", 400)
    others = [
        {"id": "other", "model": str(tiny_model(folder / "other", 500, 1)), "projection": {}, "lead": None},
        {"id": "same", "model": str(tiny_model(folder / "same", 400, 2)), "lead": None},  # both know nothing
    ]
    (folder / "train").mkdir()
    for number, text in enumerate(texts(4)):
        (folder / "train" / f"{number}.txt").write_text(text[:600])
    (folder / "held-out.jsonl").write_text(json.dumps({"text": texts(5)[4][:600]}) + "\n")
    return {
        "name": "tiny",
        "student": {"model": str(student)},
        "teachers": others[:teachers],
        "loss": {"mode": "p_kl", "vocab_topk": 64},
        "data": {"train": [str(folder / "train")], "validation": [str(folder / "held-out.jsonl")], "max_length": 64},
        "training": {"max_steps": 2, "global_batch_size": 2, "learning_rate": 1e-3, "precision": "fp32"},
        "output": {"uri": str(folder / "out")},
    }
