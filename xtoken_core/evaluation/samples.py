"""What a model writes: greedy continuations of held-out texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from xtoken_core.bounded import Refused
from xtoken_core.data.documents import Document
from xtoken_core.data.records import plain_text
from xtoken_core.errors import InputError
from xtoken_core.results.evaluation import Sample
from xtoken_core.tokenization import row_bos
from xtoken_core.tokenizer_parts import rendered

SAMPLES, PROMPT_CHARACTERS, SAMPLE_TOKENS = 3, 200, 48


@torch.no_grad()
def samples(model: PreTrainedModel, tok: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[Sample]:
    """Greedy continuations of the first held-out texts of each corpus in turn.

    The prompt is a text's beginning, or a chat up to the assistant's first answer; without those that the template refuses.
    """
    asked, begun = [], []
    for document in _one_of_each(documents)[:SAMPLES]:
        with suppress(Refused):
            asked.append(_prompt(tok, document))
            begun.append(_ids(tok, asked[-1][0], opened=isinstance(document.content, str)))
    # what models that carry a state along make of padding in front is another text
    together = [[row] for row in begun] if getattr(model, "_is_stateful", False) else [begun]
    texts = [text for rows in together if rows for text in _continued(model, tok, rows, SAMPLE_TOKENS)]
    return [Sample(prompt=prompt, text=text, reference=reference) for (prompt, reference), text in zip(asked, texts, strict=True)]


@torch.no_grad()
def answer(model: PreTrainedModel, tok: PreTrainedTokenizerFast, said: str, tokens: int) -> str:
    """The greedy answer to one message, of at most so many tokens; of a model without a chat template, the text goes on.

    Raises InputError where the template refuses the message.
    """
    if tok.chat_template is not None:
        try:
            said = rendered(tok, [{"role": "user", "content": said}], generation=True)
        except Refused as e:
            raise InputError(f"{tok.name_or_path}: its chat template refuses a message of a user: {e}") from None
    return _continued(model, tok, [_ids(tok, said, opened=tok.chat_template is None)], tokens)[0]


def _ids(tok: PreTrainedTokenizerFast, text: str, opened: bool) -> list[int]:
    """The ids of a text; `opened`: behind BOS, where rows of the tokenizer begin with one."""
    bos = row_bos(tok) if opened else None
    ids: list[int] = tok(text, add_special_tokens=False)["input_ids"]
    return ids if bos is None else [bos, *ids]


def _continued(model: PreTrainedModel, tok: PreTrainedTokenizerFast, rows: list[list[int]], tokens: int) -> list[str]:
    """The greedy continuations of rows of ids, of at most so many tokens each; the rows are padded in front, and run together."""
    pad, size = tok.pad_token_id if tok.pad_token_id is not None else 0, max(map(len, rows))
    inputs = torch.tensor([[pad] * (size - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in rows], device=model.device)
    output = model.generate(  # type: ignore[operator]
        inputs, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad, use_cache=True
    )
    return [str(tok.decode(row[size:], skip_special_tokens=True)) for row in output]


def _one_of_each(documents: Sequence[Document]) -> list[Document]:
    """Documents, the first of every corpus first, then the second of every corpus, and so on."""
    rank: dict[str, int] = {}
    keyed: list[tuple[int, int, Document]] = []
    for document in documents:
        keyed.append((rank.get(document.corpus, 0), len(keyed), document))
        rank[document.corpus] = rank.get(document.corpus, 0) + 1
    return [document for _, _, document in sorted(keyed, key=lambda k: k[:2])]


def _prompt(tok: PreTrainedTokenizerFast, document: Document) -> tuple[str, str]:
    if isinstance(document.content, str):
        text = document.content
        cut = text.rfind(" ", 1, PROMPT_CHARACTERS)  # the next word begins with its space
        cut = cut if cut > 0 else min(PROMPT_CHARACTERS, len(text) // 2)
        return text[:cut], text[cut : cut + PROMPT_CHARACTERS]
    chat = document.content
    asked = next((i for i, m in enumerate(chat.messages) if m["role"] == "assistant"), len(chat.messages))
    prompt = rendered(tok, chat.messages[:asked], chat.tools, generation=True)
    answer = plain_text(chat.messages[asked].get("content")) if asked < len(chat.messages) else ""
    return prompt, answer[:PROMPT_CHARACTERS]
