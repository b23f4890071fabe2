"""The words of a conversation: what its messages themselves say, stretch by stretch, and marks before them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xtoken_core.data.records import Conversation, Message

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode, which it keeps out of texts."""

MARK = re.compile(f"{OPEN}(\\d+){CLOSE}")
"""A mark, with the number of the words behind it."""

_REASONING = re.compile(r"</?(?:think|thinking|thought|reasoning)>")
_SPOKEN = ("reasoning_content", "reasoning", "thinking", "content", "tool_calls")
_UNSAID_KEYS = ("id", "type")
_FIXED_KEYS = (*_UNSAID_KEYS, "function", "name", "arguments", "parameters", "text", "index")


@dataclass(frozen=True)
class Words:
    """A stretch of a message's own words, without white space around it."""

    message: int
    text: str
    needed: bool
    """Whether the message would not say the same without it: the last words of its content, the name of a tool."""


def words_of(conversation: Conversation) -> list[Words]:
    """All stretches of words, message by message: reasoning, content, and of tool calls names, keys and texts."""
    found = []
    for number, message in enumerate(conversation.messages):
        said = [(field, path, text[start:end]) for field, path, text in _texts(message) for start, end in _stretches(text)]
        last = max((i for i, (field, _, _) in enumerate(said) if field == "content"), default=-1)
        for i, (field, path, text) in enumerate(said):
            is_name = field == "tool_calls" and path in (("name",), ("function", "name"))
            found.append(Words(number, text, i == last or is_name))
    return found


def marked(conversation: Conversation, chosen: set[int]) -> Conversation:
    """The conversation with marks before the chosen words, which are numbered as `words_of` does."""
    count = iter(range(10**9))

    def with_marks(text: str) -> str:
        pieces, done = [], 0
        for start, _ in _stretches(text):
            number = next(count)
            pieces += [text[done:start], f"{OPEN}{number}{CLOSE}" if number in chosen else ""]
            done = start
        return "".join([*pieces, text[done:]])

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return with_marks(value)
        if isinstance(value, list):
            return [walk(item) for item in value]
        if isinstance(value, Mapping):
            return {(with_marks(k) if k not in _FIXED_KEYS else k): v if k in _UNSAID_KEYS else walk(v) for k, v in value.items()}
        return value

    return Conversation(
        [m | {field: walk(m[field]) for field in _SPOKEN if field in m} for m in conversation.messages], conversation.tools
    )


def _texts(message: Message) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(field, keys on the way, text) of every text that a message says, in the order in which `marked` walks it."""

    def walk(field: str, path: tuple[str, ...], value: Any) -> Iterator[tuple[str, tuple[str, ...], str]]:
        if isinstance(value, str):
            yield field, path, value
        elif isinstance(value, list):
            for item in value:
                yield from walk(field, path, item)
        elif isinstance(value, Mapping):
            for name, item in value.items():
                if name not in _FIXED_KEYS:
                    yield field, (*path, "a key"), name
                if name not in _UNSAID_KEYS:
                    yield from walk(field, (*path, name), item)

    for field in _SPOKEN:
        if field in message:
            yield from walk(field, (), message[field])


def _stretches(text: str) -> Iterator[tuple[int, int]]:
    """[start, end) of a text's words: without white space around them, apart where tags of reasoning stand between."""
    done = 0
    for start, end in [*(m.span() for m in _REASONING.finditer(text)), (len(text), len(text))]:
        piece = text[done:start]
        if piece.strip():
            yield done + len(piece) - len(piece.lstrip()), done + len(piece.rstrip())
        done = end
