"""Records of data files, in the shapes that people publish: texts, chats, ShareGPT, prompt and completion."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from xtoken_core.data.calls import with_object_arguments
from xtoken_core.spec import DataSpec

Message = dict[str, Any]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

MOST_MESSAGES = 1000
"""Of a chat. What templates make of the turns is asked for each turn anew, so that the time grows with their square."""

DEEPEST = 64
"""Levels of lists and objects in a chat: arguments of tools may hold some."""

_NAMED = 10

_MEDIA = ("image", "audio", "video")
_MEDIA_COLUMNS = (*_MEDIA, *(f"{kind}s" for kind in _MEDIA))


class Unusable(Exception):
    """Why a record cannot be used; it is left out and counted under these words."""


class MissingColumn(Unusable):
    """A record has no column that the spec names."""

    def __init__(self, reason: str, columns: Iterable[str]):
        super().__init__(reason)
        self.there = named_columns(columns)
        """Those that it has, in words."""


def named_columns(columns: Iterable[str]) -> str:
    """The first columns of a table, in words, so that one sees what the spec may name."""
    names = list(columns)
    named = ", ".join(name[:40] for name in names[:_NAMED])
    return f"; there are {named}{' and more' if len(names) > _NAMED else ''}" if names else ""


class Refused(Unusable):
    """A record shows that the data are of a kind that cannot be distilled."""


@dataclass(frozen=True)
class Conversation:
    """One chat, as a chat template takes it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    def learned(self, number: int) -> bool:
        """Whether a message may be a target: `train: false` and `weight: 0` leave it out."""
        message = self.messages[number]
        return message.get("train") is not False and message.get("weight") != 0


Content = str | Conversation


def text_of(content: Content) -> str:
    """All that a document says: its text, or the contents of its messages one after the other."""
    return content if isinstance(content, str) else "".join(plain_text(m.get("content")) for m in content.messages)


def plain_text(content: Any) -> str:
    """A message's content as text: none is empty, text parts are put together."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def columns_read(data: DataSpec) -> tuple[str, ...]:
    """The columns that `content_of` looks at."""
    chats = (data.messages_key, "conversations", "prompt", "completion", "system", "tools", "functions", *_MEDIA_COLUMNS)
    return {"text": (data.text_key,), "messages": chats, "auto": (data.text_key, *chats)}[data.format]


def content_of(record: Mapping[str, Any], data: DataSpec) -> Content:
    """The text or chat of a record: what `data.format` says, or what it looks like: a chat, unless it has the text that the spec names.

    A null is as good as no column, which it stands for in tables, and so are an empty list and an empty text; a record that has
    nothing else is an empty text. Raises Unusable where it holds neither text nor chat, and Refused for images and audio.
    """
    text = (data.text_key,)
    shapes: list[tuple[str, ...]] = [(data.messages_key,), ("conversations",), ("prompt", "completion")]
    if data.format == "text":
        shapes = [text]
    elif data.format == "auto":
        shapes.insert(0 if "text_key" in data.model_fields_set else len(shapes), text)
    known = [keys for keys in shapes if all(key in record for key in keys)]
    if not known:
        raise MissingColumn(_missing(data), record)
    keys = next((keys for keys in known if any(record[key] not in (None, "", []) for key in keys)), None)
    if keys is None:
        return ""
    if keys != text:
        return _conversation(_messages(record, keys), record, keys[0])
    if not _is_text(record[data.text_key]):
        raise Unusable(f"{data.text_key!r} is not text")
    return str(record[data.text_key]).removeprefix("\ufeff")


def without_filling(value: Any) -> Any:
    """A value of a table without the nulls in its objects: Arrow gives each of them the keys of all that stand in its column."""
    if isinstance(value, dict):
        return {name: without_filling(item) for name, item in value.items() if item is not None}
    return [without_filling(item) for item in value] if isinstance(value, list) else value


def content_of_row(row: Mapping[str, Any], data: DataSpec) -> Content:
    """`content_of` a row of a table."""
    return content_of({name: without_filling(value) for name, value in row.items()}, data)


def _missing(data: DataSpec) -> str:
    if data.format == "messages":
        return f"no field {data.messages_key!r} (data.messages_key), 'conversations', or 'prompt' and 'completion'"
    return f"no field {data.text_key!r} (data.text_key){' and none of a chat' if data.format == 'auto' else ''}"


def _messages(record: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The messages of a record in these columns, its system prompt before them; not checked yet."""
    if len(keys) == 2:
        messages = [*_turns(record["prompt"], "user"), *_turns(record["completion"], "assistant")]
    else:
        messages = record[keys[0]]
        if not isinstance(messages, list):
            return messages
    messages = [_from_turn(m) if isinstance(m, dict) and m.get("from") and not m.get("role") else m for m in messages]
    system = record.get("system")
    said = any(isinstance(m, dict) and m.get("role") == "system" and m.get("content") == system for m in messages)
    return [{"role": "system", "content": system}, *messages] if system and not said else messages


def _conversation(messages: Any, record: Mapping[str, Any], key: str) -> Conversation:
    """The chat of a record, checked: roles and contents are text, tools a list; keys without a value are left out."""
    for column in _MEDIA_COLUMNS:
        if record.get(column):
            raise Refused(f"{column!r} beside {key!r}: only text can be distilled, not images, audio or video")
    if record.get("functions"):
        raise Unusable(f"'functions' beside {key!r}: OpenAI's older form; tools stand in 'tools'")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and _is_text(m.get("role")) for m in messages):
        raise Unusable(f"{key!r} is not a list of messages with a role")
    if len(messages) > MOST_MESSAGES:
        raise Unusable(f"more than {MOST_MESSAGES} messages in one chat")
    cleaned = [{n: v for n, v in with_object_arguments(m).items() if v is not None or n == "content"} for m in messages]
    for message in cleaned:
        message.setdefault("content", None)
        if "function_call" in message:
            raise Unusable("a message's 'function_call' is OpenAI's older form; calls stand in 'tool_calls'")
        _check_content(message, key)
        if message.get("weight", 1) not in (0, 1):
            raise Unusable("a message's weight is neither 0 nor 1")
        if not isinstance(message.get("train", True), bool):
            raise Unusable("a message's train is neither true nor false")
    _check_depth([cleaned, tools := _tools(record.get("tools"))], DEEPEST)
    return Conversation(cleaned, tools)


def _check_depth(value: Any, left: int) -> None:
    """Raises Unusable for what no chat template should be given: values in values without end, texts that UTF-8 cannot write."""
    if isinstance(value, str) and not _is_text(value):
        raise Unusable("a text of a message is not text: half of a surrogate pair")
    if isinstance(value, dict | list) and not left:
        raise Unusable("nested too deeply")
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        _check_depth(item, left - 1)


def _check_content(message: Message, key: str) -> None:
    content = message["content"]
    parts = content if isinstance(content, list) else []
    for part in parts:
        kind = str(part.get("type") or "text") if isinstance(part, dict) else "text"
        if any(media in kind for media in _MEDIA):
            raise Refused(f"{key!r} holds a part of type {kind!r}: only text can be distilled, not images, audio or video")
        if kind != "text":
            raise Unusable(
                f"a part of type {kind!r} in a content: it takes texts, tool calls stand in 'tool_calls', reasoning in 'reasoning_content'"
            )
    usable = content is None or _is_text(content) or isinstance(content, list)
    if not usable or not all(isinstance(part, dict) and _is_text(part.get("text")) for part in parts):
        raise Unusable("a message's content is neither text nor a list of text parts")
    if parts:  # columns of Arrow give every part the keys of all
        message["content"] = [{name: v for name, v in part.items() if v is not None} for part in parts]


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools of a record: a list of functions, or JSON of one."""
    if isinstance(tools, str):
        tools = _json(tools, "'tools' is neither a list nor JSON") if tools.strip() else None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("'tools' is not a list of functions")
    return tools


def _from_turn(turn: Mapping[str, Any]) -> Message:
    """ShareGPT's turn with `from` and `value` as a message; other keys (`weight`) stay."""
    rest = {name: value for name, value in turn.items() if name not in ("from", "value", "role")}
    if turn.get("from") == "function_call":
        calls = _json(turn.get("value"), "a function_call is not JSON")
        called = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        return {"role": "assistant", "content": None, "tool_calls": called, **rest}
    role = _SHAREGPT_ROLES.get(str(turn.get("from")))
    if role is None:
        raise Unusable(f"a turn from {turn.get('from')!r}")
    return {"role": role, "content": turn.get("value"), **rest}


def _turns(value: Any, role: str) -> list[Any]:
    """A prompt or a completion: a text, or messages already."""
    if value is None or isinstance(value, list):
        return value or []
    return [{"role": role, "content": value}]


def _json(text: Any, reason: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise Unusable(reason) from None


def _is_text(value: Any) -> bool:
    """Whether it is a str that UTF-8 can write: JSON can hold half a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def parsed_line(line: bytes) -> dict[str, Any]:
    """The record of one line of JSON. Raises Unusable."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Unusable("not UTF-8 text") from None
    except json.JSONDecodeError as e:
        raise Unusable(f"not JSON: {e.msg}") from None
    except ValueError:
        raise Unusable("a number of more digits than Python reads") from None
    except RecursionError:
        raise Unusable("not JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise Unusable("not a JSON object")
    return record


def has_any(columns: Iterable[str], data: DataSpec) -> bool:
    """Whether a table with these columns can hold what `data.format` says."""
    try:
        content_of(dict.fromkeys(columns), data)
    except MissingColumn:
        return False
    except Unusable:
        return True
    return True
