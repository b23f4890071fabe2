"""Chats: every tokenizer formats the same messages by its own template, and only the messages' contents align.

The template is rendered around placeholders, split there, and template and contents are tokenized apart. This is how a
chat is tokenized when it is generated (the prompt ends where the answer begins), contents can neither be mistaken for
template text nor smuggle in special tokens, and a template is rendered once per sequence of roles.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from xtoken_core.data.rows import Side, Tokenized, joined, tokenize_texts
from xtoken_core.errors import InputError

Message = dict[str, str]

_PLACEHOLDER = "\ue000{}\ue001"  # private-use characters, which no template holds


class ChatTokenizer:
    """Tokenizes and aligns chats for all sides.

    assistant_only: only the assistant's messages are targets and have chunks; of the others, and with it False of none,
    tokens are context. The special token that ends a target message is a target too, so that the student learns to stop.
    """

    def __init__(self, sides: Sequence[Side], assistant_only: bool):
        """Raises InputError for a tokenizer without a chat template."""
        for side in sides:
            if not side.tokenizer.chat_template:
                raise InputError(f"{side.name}: its tokenizer has no chat template, which data.format: messages needs")
        self.assistant_only = assistant_only
        self.sides = [replace(side, bos=None) for side in sides]
        """As rows need them: a BOS, where there is one, is the template's business."""
        self._frames: dict[tuple[str, ...], list[list[np.ndarray]] | str] = {}

    def __call__(self, chats: Sequence[Sequence[Message]]) -> list[Tokenized | str]:
        """Each chat in every tokenization, or the reason why it cannot be used. Contents lose the white space around them."""
        contents = iter(tokenize_texts([message["content"].strip() for chat in chats for message in chat], self.sides))
        return [self._assembled([message["role"] for message in chat], list(islice(contents, len(chat)))) for chat in chats]

    def _assembled(self, roles: Sequence[str], contents: Sequence[Tokenized | str]) -> Tokenized | str:
        frames = self._frame(tuple(roles)) if roles else "no text"
        if isinstance(frames, str):
            return frames
        pieces = [self._template([frame[0] for frame in frames], closes_target=False)]
        for number, (role, content) in enumerate(zip(roles, contents), 1):
            if isinstance(content, str):
                return content
            target = role == "assistant" or not self.assistant_only
            pieces.append(content if target else _context(content))
            pieces.append(self._template([frame[number] for frame in frames], closes_target=target))
        return joined(pieces)

    def _template(self, ids: list[np.ndarray], closes_target: bool) -> Tokenized:
        """Template tokens as a piece; the first one may end a target message."""
        chunks = [(np.full(len(ids[0]), -1, np.int32), np.full(len(own), -1, np.int32), np.zeros(0, bool)) for own in ids[1:]]
        nothing = [np.zeros(len(tokens), np.uint16) for tokens in ids]
        ends = np.array([[0] * len(ids), [len(tokens) for tokens in ids]])
        piece = Tokenized(ids, nothing, [np.zeros(len(tokens), np.uint8) for tokens in ids], chunks, ends)
        if closes_target:
            for side, tokens, targets in zip(self.sides, ids, piece.targets):
                targets[:1] = side.table.special[tokens[:1]]
        return piece

    def _frame(self, roles: tuple[str, ...]) -> list[list[np.ndarray]] | str:
        """Per side the template's ids before, between and after the messages; or why a template does not take these roles."""
        if roles not in self._frames:
            parts = [template_parts(side, roles) for side in self.sides]
            reasons = [part for part in parts if isinstance(part, str)]
            self._frames[roles] = reasons[0] if reasons else [_template_ids(side, part) for side, part in zip(self.sides, parts)]
        return self._frames[roles]


def _template_ids(side: Side, parts: Sequence[str]) -> list[np.ndarray]:
    """int32 ids of each part of a template, special tokens recognised."""
    encoded = side.tokenizer(list(parts), add_special_tokens=False)["input_ids"]
    return [np.array(ids, np.int32) for ids in encoded]


def template_parts(side: Side, roles: Sequence[str]) -> list[str] | str:
    """What the chat template puts before, between and after messages of these roles; or why it does not take them."""
    from jinja2 import TemplateError

    messages = [{"role": role, "content": _PLACEHOLDER.format(number)} for number, role in enumerate(roles)]
    try:
        text = str(side.tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as e:
        return f"{side.name}: its chat template refuses the roles {', '.join(roles)}: {e}"
    except (TypeError, ValueError) as e:  # a template that cannot be run at all, or several and none of them the default
        raise InputError(f"{side.name}: its chat template fails: {' '.join(str(e).split())}") from None
    pieces = re.split(_PLACEHOLDER.format(r"(\d+)"), text)
    if pieces[1::2] != [str(number) for number in range(len(roles))]:
        return f"{side.name}: its chat template leaves out, repeats or reorders messages of the roles {', '.join(roles)}"
    parts = pieces[0::2]
    if side.table.dummy_prefix:  # such a tokenizer puts a space before every piece by itself
        parts = [parts[0].removesuffix(" "), *(part.removeprefix(" ").removesuffix(" ") for part in parts[1:])]
    return parts


def _context(piece: Tokenized) -> Tokenized:
    """The piece without targets and chunks."""
    none = np.zeros(0, bool)
    chunks = [(np.full_like(student, -1), np.full_like(teacher, -1), none) for student, teacher, _ in piece.chunks]
    return replace(piece, targets=[np.zeros_like(targets) for targets in piece.targets], chunks=chunks)
