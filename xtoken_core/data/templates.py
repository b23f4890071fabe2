"""What a chat template makes of a conversation: the rendered text, where each message's own words stand in it, and its turns.

A template is a function of whole messages: it trims contents, moves the reasoning, writes tool calls in a form of its own, and
what it makes of one message can depend on the others. So the conversation is rendered whole, as `apply_chat_template` does. Where
its words went is seen from a second rendering, with a mark before each stretch of words: without the marks it must be the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from os.path import commonprefix
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from xtoken_core.bounded import Bounded, Overrun, Refused
from xtoken_core.data.calls import with_json_arguments
from xtoken_core.data.records import Conversation, Message, plain_text
from xtoken_core.data.words import CLOSE, MARK, OPEN, Words, marked
from xtoken_core.errors import InputError

_render: Any = chat_template_utils.render_jinja_template  # transformers has its types wrong

MOST_OVERRUNS = 3
"""Conversations that may cost a template more time or memory than it has. They are left out; one more ends the run."""

Content = Literal["left out", "null", "empty"]
"""What becomes of a content of null."""

Form = Callable[[Conversation], Conversation]
"""A way to say a conversation. It may be said with marks in it, and has them in the same order."""

_PROBE_USER: Message = {"role": "user", "content": "?"}

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Unmapped(Exception):
    """Why a conversation cannot be used."""


class Rewritten(Unmapped):
    """A template takes a conversation, and what is to be learned is not in the text as it was said."""


@dataclass(frozen=True)
class Turn:
    """What a model writes for one message: [start, end) in the rendering, its end token included."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Rendering:
    """A conversation as one tokenizer's template writes it."""

    text: str
    places: dict[int, int]
    """Where each stretch of words begins, by its number; those that are not there as they are have no place."""
    turns: list[Turn]
    left_out: list[str]
    """What the conversation holds and the text does not, in words."""


class Template:
    """The chat template of one tokenizer. It is a program of somebody else's, and runs within bounds (`bounded`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, specials: re.Pattern[str]):
        """specials: finds names of special tokens."""
        self.tokenizer: Any = tokenizer
        self.specials = specials
        self._run = Bounded(partial(_run, tokenizer))
        self._overruns = 0
        self._takes_parts = self._understands_parts()
        self._prints_objects = self._prints_arguments()

    def rendering(self, conversation: Conversation, words: list[Words], roles: tuple[str, ...]) -> Rendering:
        """The conversation with its words and the turns of `roles`.

        Raises Unmapped where the template refuses the conversation, or a turn does not say what its message says.
        """
        refused: list[Unmapped] = []
        for form in self._forms(conversation):
            try:
                return self._rendering(conversation, form, words, roles)
            except Unmapped as e:
                refused.append(e)
        raise next((e for e in refused if isinstance(e, Rewritten)), refused[0])  # which tells more than how another form failed

    def render(self, conversation: Conversation, count: int | None = None, generation: bool = False) -> str:
        """The first `count` messages (None: all), with the prompt for an answer or not.

        Raises Unmapped where the template refuses, and InputError where it goes beyond its bounds too often.
        """
        messages = conversation.messages[:count]
        how: How = "as it is" if any(message.get("content", "") is None for message in messages) else "as transformers does"
        return str(self._told(how, messages, conversation.tools, generation))

    def _told(self, how: How, messages: list[Message], tools: Any, generation: bool = False) -> Any:
        try:
            return self._run(how, messages, tools, generation)
        except Overrun as e:
            self._overruns += 1
            if self._overruns > MOST_OVERRUNS:
                raise InputError(f"its chat template: {e}, on {self._overruns} chats") from None
            raise Unmapped(f"its chat template: {e}") from None
        except Refused as e:
            raise Unmapped(f"its chat template refuses it: {e}") from None

    def _forms(self, conversation: Conversation) -> Iterator[Form]:
        """The ways to say it in which a template may know it, the first that it takes counts.

        A content of null is left out, as transformers does; templates older than that want the null itself, or an empty text.
        Arguments of calls are objects, and for templates that want it JSON.
        """
        contents: list[Content] = ["left out"]
        if any(message.get("content", "") is None for message in conversation.messages):
            contents += ["null", "empty"]
        calls = any(message.get("tool_calls") for message in conversation.messages)
        for as_json in [True] if self._prints_objects else [False, True] if calls else [False]:
            for content in contents:
                yield partial(self._said, content, as_json)

    def _said(self, content: Content, as_json: bool, conversation: Conversation) -> Conversation:
        """The conversation in one of these forms; lists of text parts are one text for a template that would print the list."""
        messages = []
        for message in conversation.messages:
            if isinstance(message.get("content"), list) and not self._takes_parts:
                message = message | {"content": plain_text(message["content"])}
            if content == "left out":
                message = {name: value for name, value in message.items() if value is not None}
            elif content == "empty":
                message = message | {"content": message.get("content") or ""}
            messages.append(with_json_arguments(message) if as_json else message)
        return replace(conversation, messages=messages)

    def _rendering(self, conversation: Conversation, form: Form, words: list[Words], roles: tuple[str, ...]) -> Rendering:
        said = form(conversation)
        text = self.render(said)
        if OPEN in text or CLOSE in text:
            raise Unmapped("it holds characters that Unicode keeps out of texts")
        places, there = self._places(conversation, form, words, text)
        turns: list[Turn] = []
        floor = 0
        for number, message in enumerate(said.messages):
            own = [i for i, each in enumerate(words) if each.message == number]
            spans = [(places[i], places[i] + len(words[i].text)) for i in own if i in places]
            if message["role"] in roles and said.learned(number):
                if any(words[i].needed and i not in places for i in own):
                    raise Rewritten(f"its chat template leaves out or rewrites what the {message['role']} says")
                if spans:
                    start = self._turn_start(said, number, text, floor, min(spans)[0])
                    turns.append(Turn(number, start, self._turn_end(said, number, text, min(spans)[0], max(spans)[1])))
            floor = max([floor, *(end for _, end in spans)])
        return Rendering(text, places, self._as_the_template_says(said, text, turns), self._left_out(said, words, there, text))

    def _left_out(self, said: Conversation, words: list[Words], there: set[int], text: str) -> list[str]:
        """What is not in the text and may well be missed: all that a message of some role says, the last answer's reasoning, the tools."""
        missing = [w for i, w in enumerate(words) if i not in there]
        roles = {said.messages[w.message]["role"] for w in missing if w.needed}
        found = [f"its chat template leaves out what the {role} says" for role in sorted(roles)]
        last = max((number for number, message in enumerate(said.messages) if message["role"] == "assistant"), default=-1)
        if any(w.message == last and not w.needed for w in missing):
            found.append("its chat template leaves out a part of the last answer: its reasoning, as a rule")
        try:
            without_tools = said.tools is not None and self.render(replace(said, tools=None)) == text
        except Unmapped:  # it asks for them
            without_tools = False
        return found + ["its chat template leaves out the tools"] * without_tools

    def _understands_parts(self) -> bool:
        probe = [{"role": "user", "content": [{"type": "text", "text": OPEN}]}]
        try:
            text = self.render(Conversation(probe))
        except Unmapped:
            return False
        return OPEN in text and "'text'" not in text and '"text"' not in text

    def _prints_arguments(self) -> bool:
        """Whether it puts arguments that are an object down as Python would print them."""
        call = {"id": "000000000", "type": "function", "function": {"name": "f", "arguments": {OPEN: 1}}}
        probe: list[Message] = [_PROBE_USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            return repr({OPEN: 1}) in self.render(Conversation(probe))
        except Unmapped:
            return False

    def _places(self, conversation: Conversation, form: Form, words: list[Words], text: str) -> tuple[dict[int, int], set[int]]:
        """Where words stand in the text, verbatim: from a rendering with marks in all of them, else in those that are needed.

        And which are there at all, be it escaped: all where nothing is known.
        """
        for chosen in (set(range(len(words))), {i for i, w in enumerate(words) if w.needed}):
            rendered = self.render(form(marked(conversation, chosen)))
            if MARK.sub("", rendered) != text:
                continue  # the template has looked at a mark
            places: dict[int, list[int]] = {}
            removed = 0
            for mark in MARK.finditer(rendered):
                places.setdefault(int(mark[1]), []).append(mark.start() - removed)
                removed += len(mark[0])
            verbatim = {i: p[0] for i, p in places.items() if len(p) == 1 and text.startswith(words[i].text, p[0])}
            return verbatim, set(places) | set(range(len(words))) - chosen
        return {}, set(range(len(words)))

    def _turn_start(self, conversation: Conversation, number: int, text: str, floor: int, first: int) -> int:
        """Where the prompt for this answer ends: between the words before it, which end at `floor`, and its own at `first`."""
        if conversation.messages[number]["role"] != "assistant" or not number:
            return first
        try:
            prompt, before = self.render(conversation, number, generation=True), self.render(conversation, number)
        except Unmapped:  # a conversation that ends so is not taken
            return first
        if text.startswith(prompt) and len(prompt) <= first:
            return len(prompt) + (
                self._header(conversation, number, prompt, text[len(prompt) : first]) if prompt == before else 0
            )
        if not prompt.startswith(before):
            return first
        header = prompt[len(before) :]  # what comes before has another form in the whole conversation
        for end in sorted({len(header), *(m.end() for m in self.specials.finditer(header))}, reverse=True):
            found = text.rfind(header[:end], floor, first)
            if end and found >= 0:  # the prompt may go on otherwise than the turn, with the reasoning's tag
                return found + len(commonprefix([header, text[found:first]]))
        return first

    def _header(self, conversation: Conversation, number: int, prompt: str, opening: str) -> int:
        """How much of what stands between prompt and words any other answer would have there: it is not for the model to write.

        That is what a template that knows no prompt for an answer needs.
        """
        other: Message = {"role": "assistant", "content": OPEN}
        try:
            text = self.render(replace(conversation, messages=[*conversation.messages[:number], other]))
        except Unmapped:
            return 0
        if not text.startswith(prompt) or OPEN not in text:
            return 0
        header = commonprefix([opening, text[len(prompt) : text.index(OPEN)]])
        return len(header) if header.strip() else 0  # a blank is the model's

    def _turn_end(self, conversation: Conversation, number: int, text: str, first: int, end: int) -> int:
        """Behind the token that ends the turn, and else behind what closes its words, which are [first, end)."""
        try:
            whole = self.render(conversation, number + 1) if number + 1 < len(conversation.messages) else text
        except Unmapped:
            whole = ""
        if len(whole) >= end and text.startswith(whole):
            return max(end, len(whole.rstrip()))
        spoken, place = text[first:end], len(whole)
        while (
            place := whole.rfind(spoken, 0, place + len(spoken) - 1)
        ) >= 0:  # the turn as the last one, and what closes it there
            closing = whole[place + len(spoken) :].rstrip()
            if closing and text.startswith(closing, end):
                return end + len(closing)
        special = self.specials.search(text, end)
        return special.end() if special and not text[end : special.start()].strip() else end

    def _as_the_template_says(self, conversation: Conversation, text: str, turns: list[Turn]) -> list[Turn]:
        """The turns with the spans of `{% generation %}`, where the template has it; their end tokens stay."""
        template = self.tokenizer.get_chat_template(tools=conversation.tools)
        if not _GENERATION.search(template):
            return turns
        rendered, spans = self._told("with spans", conversation.messages, conversation.tools)
        if rendered != text:
            return turns
        found = []
        for turn in turns:
            start, end = next(((a, b) for a, b in spans if a < turn.end and turn.start < b), (turn.start, turn.end))
            found.append(Turn(turn.message, start, max(turn.end, end)))
        return found


How = Literal["as transformers does", "as it is", "with spans"]
"""Ways to render: by `apply_chat_template`; with the messages' nulls left in; with the spans of `{% generation %}` besides the text."""


def _run(tokenizer: Any, how: How, messages: list[Message], tools: Any, generation: bool) -> Any:
    """Runs the template."""
    if how == "as transformers does":
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generation))
    options = {**tokenizer.special_tokens_map, "add_generation_prompt": generation}
    options |= {"return_assistant_tokens_mask": True} if how == "with spans" else {}
    rendered, spans = _render([messages], tools=tools, chat_template=tokenizer.get_chat_template(tools=tools), **options)
    return (str(rendered[0]), spans[0]) if how == "with spans" else str(rendered[0])
