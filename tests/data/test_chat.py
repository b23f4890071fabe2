"""Chats: tokens are those of the tokenizer's own rendering, words align, and the turns to be learned are targets."""

from __future__ import annotations

import copy
import json
from functools import cache, lru_cache
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken

from tests.support import assets
from tests.support.chat_templates import (
    ARGUMENTS_AS_THEY_ARE,
    CHATML,
    GENERATION,
    HARMONY,
    INST,
    LLAMA_TOOLS,
    NEWLINE_EOS,
    SHOUTING,
    THINKING_PROMPT,
)
from tests.support.examples import examples
from tests.support.tiny import tiny_tokenizer
from xtoken_core.data.chat import ChatTokenizer
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.data.reading import load_rows
from xtoken_core.data.records import Conversation, content_of
from xtoken_core.data.rows import NO_TARGET, Side, Tokenized, document_rows
from xtoken_core.errors import InputError
from xtoken_core.spec import DataSpec, DistillationSpec

PUBLISHED = ("qwen3-chat", "llama3.1-chat", "deepseek-v3-chat", "gemma3-chat", "nemo-chat", "smollm2")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [{"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 3}}}]
CALLING = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny, 21"},
    {"role": "assistant", "content": "It is sunny."},
]
THINKING = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nIt is 4."},
    {"role": "user", "content": " and 3? \n"},
    {"role": "assistant", "content": "<think>Hm</think>Six."},
]
REASONED = [THINKING[0], {"role": "assistant", "reasoning_content": "Two and two.", "content": "It is 4."}]
PLAIN = [
    {"role": "user", "content": "  What is 12 + 30?\n"},
    {"role": "assistant", "content": "It is 42, naïve asker! 日本"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": " user\n"},
]


@cache
def side(name: str, template: str | None = None) -> Side:
    """A tokenizer by the name of its asset, with its own template or another; `harmony` has the special tokens of gpt-oss."""
    if name in ("tiny", "harmony"):
        tok = tiny_tokenizer(400)
    else:
        tok = copy.copy(assets.tokenizer(name))
    if name == "harmony":
        names = ("start", "end", "message", "channel", "return", "call")
        tok.add_special_tokens({"additional_special_tokens": [AddedToken(f"<|{n}|>", special=True) for n in names]})
        tok.add_special_tokens({"eos_token": "<|return|>"})
    if template is not None:
        tok.chat_template = template
    return Side.of(name, "student", tok)


@lru_cache(maxsize=1)
def reader(sides: tuple[Side, ...], assistant_only: bool) -> ChatTokenizer:
    """The last one asked for, since each has a process of its own for every template."""
    return ChatTokenizer(sides, assistant_only)


@pytest.fixture(scope="module", autouse=True)
def no_reader_left():
    yield
    reader.cache_clear()


def read(chat, *sides: Side, tools=None, assistant_only=True) -> Tokenized | str:
    [found] = reader(sides, assistant_only)([Conversation(copy.deepcopy(chat), tools)])
    return found


def learned(found: Tokenized, of: Side, side: int = 0) -> str:
    """The text of one side's targets."""
    return of.tokenizer.decode(found.ids[side][found.targets[side] > 0])


def own_ids(of: Side, chat, tools=None) -> list[int]:
    """What the tokenizer itself makes of the chat."""
    return of.tokenizer.apply_chat_template(chat, tools=tools, tokenize=True, return_dict=True)["input_ids"]


TRAITS = [
    *((name, None) for name in PUBLISHED),
    ("llama3", LLAMA_TOOLS),
    ("harmony", HARMONY),
    ("mistral", INST),
    ("qwen3", GENERATION),
]


@pytest.mark.parametrize("chat", [PLAIN, THINKING, REASONED, CALLING], ids=["plain", "thinking", "reasoned", "calling"])
@pytest.mark.parametrize(("name", "template"), TRAITS, ids=[f"{n}{'' if t is None else '*'}" for n, t in TRAITS])
def test_rows_hold_what_the_template_renders(name, template, chat):
    of, tools = side(name, template), TOOLS if chat is CALLING else None
    found = read(chat, of, tools=tools)
    if isinstance(found, str):  # told, and for a reason
        assert chat is CALLING and name in ("llama3.1-chat", "deepseek-v3-chat", "gemma3-chat", "smollm2", "mistral", "qwen3")
        assert "chat template leaves out or rewrites" in found or "chat template refuses it" in found
        return
    assert found.ids[0].tolist() == own_ids(of, chat, tools)
    said = learned(found, of)
    last = chat[-1]["content"].split("</think>")[-1].strip()
    assert last in said and of.table.special[found.ids[0][found.targets[0] > 0][-1]]  # the answer, and the end of the turn
    assert "What is" not in said and "Weather in" not in said and "sunny, 21" not in said
    if chat is CALLING:
        assert all(part in said for part in ("weather", "city", "Paris", "3"))


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co", "Cn", "Cc"]), min_size=1, max_size=12)
SAID = st.lists(
    WORDS | st.sampled_from(["\n", "  ", "a", "user", "assistant\n", "```json\n{}\n```", "<b>", "'"]), min_size=1
).map("".join)


@pytest.mark.parametrize("name", ["qwen3-chat", "llama3.1-chat", "deepseek-v3-chat", "gemma3-chat", "nemo-chat"])
@given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3))
@examples(25)
def test_any_chat_is_what_the_template_renders(name, turns):
    of = side(name)
    names = [token.content for token in of.tokenizer.added_tokens_decoder.values() if token.special]
    assume(
        not any(token in text for turn in turns for text in turn for token in names)
    )  # they stay text, which another test holds
    chat = [
        message
        for asked, said in turns
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": said})
    ]
    found = read(chat, of)
    assert not isinstance(found, str), found
    assert found.ids[0].tolist() == own_ids(of, chat)
    ends = [i for i in found.ids[0][found.targets[0] > 0].tolist() if i == of.tokenizer.eos_token_id]
    assert len(ends) == sum(bool(said.strip()) for _, said in turns)
    assert found.widths[0][found.targets[0] > 0].sum() == sum(len(of.table.normalize(said.strip()).encode()) for _, said in turns)


@pytest.mark.parametrize(
    ("student", "teacher"), list(permutations(["qwen3-chat", "llama3.1-chat", "gemma3-chat", "nemo-chat"], 2))
)
def test_words_align_and_templates_do_not(student, teacher):
    sides = side(student), side(teacher)
    found = read(PLAIN, *sides)
    [(*chunk_ids, exact)] = found.chunks
    assert exact.all() and len(exact) > 8
    texts = [[s.tokenizer.decode(ids[own == k]) for k in range(len(exact))] for s, ids, own in zip(sides, found.ids, chunk_ids)]
    ends = [(a, b) for a, b in zip(*texts) if a != b]
    assert set(ends) == {(sides[0].tokenizer.eos_token, sides[1].tokenizer.eos_token)} and len(ends) == 2
    assert {"It", " is"} <= set(texts[0]) and "user" not in texts[0][:3]
    for own, targets in zip(chunk_ids, found.targets):
        assert (targets[own >= 0] == 1).all()
        assert (np.diff(own[own >= 0]) >= 0).all()


def test_a_token_that_also_covers_the_template_has_no_chunk():
    """Mistral's first token of an answer is `▁It`: it begins with the template's blank, where the student has none."""
    sides = side("qwen3", CHATML), side("mistral", INST)
    found = read([PLAIN[0], {"role": "assistant", "content": "It is 42."}], *sides)
    [(student, teacher, exact)] = found.chunks
    first = sides[1].tokenizer.convert_tokens_to_ids("▁It")
    assert teacher[found.ids[1] == first].tolist() == [-1] and found.targets[1][found.ids[1] == first].tolist() == [1]
    assert [sides[0].tokenizer.decode(found.ids[0][student == k]) for k in range(3)] == [" is", " ", "4"]
    assert exact.all()


def test_a_tool_call_is_shared_as_far_as_both_templates_write_it_alike():
    sides = side("qwen3-chat"), side("llama3", LLAMA_TOOLS)
    found = read(CALLING, *sides, tools=TOOLS)
    [(student, _, exact)] = found.chunks
    shared = sides[0].tokenizer.decode(found.ids[0][student >= 0])
    assert exact.all() and "weather" in shared and 'city": "Paris", "days' in shared and "arguments" not in shared


def test_a_content_of_null_is_what_the_template_knows():
    for name, call in (("qwen3-chat", '"arguments": {"city"'), ("deepseek-v3-chat", "weather\n```json\n{")):
        chat = copy.deepcopy(CALLING)
        chat[1] |= {"content": None}
        chat[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Paris"}'
        found = read(chat, side(name), tools=TOOLS)
        assert call in learned(found, side(name)) and "Paris" in learned(found, side(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_lists_of_text_parts_are_text(name):
    parts = [m | {"content": [{"type": "text", "text": m["content"].strip()}]} for m in PLAIN]
    text = [m | {"content": m["content"].strip()} for m in PLAIN]
    assert read(parts, side(name)).ids[0].tolist() == own_ids(side(name), text)


def test_several_text_parts_are_one_text_for_a_template_that_takes_none():
    parts = [m | {"content": [{"type": "text", "text": t} for t in ("So ", "be\n", "it.")]} for m in PLAIN]
    sides = side("qwen3", CHATML), side("llama3.1-chat")
    found = read(parts, *sides)
    assert [of.tokenizer.decode(ids) for of, ids in zip(sides, found.ids)] == [
        of.tokenizer.apply_chat_template([m | {"content": "So be\nit."} for m in PLAIN], tokenize=False) for of in sides
    ]
    assert learned(found, sides[0]) == "So be\nit.<|im_end|>" * 2 and len(found.chunks[0][2]) == 2 * 6


CALLED = {
    ("llama3", LLAMA_TOOLS): '"parameters": {"city": "Paris", "days": 3}}',
    ("nemo-chat", None): '"arguments": {"city": "Paris", "days": 3}, "id"',
    ("qwen3-chat", None): '"arguments": {"city": "Paris", "days": 3}}\n',
    ("deepseek-v3-chat", None): 'weather\n```json\n{"city": "Paris", "days": 3}\n',
    ("qwen3", ARGUMENTS_AS_THEY_ARE): 'weather({"city": "Paris", "days": 3})',
}


@pytest.mark.parametrize(("of", "written"), CALLED.items(), ids=[f"{name}{'' if t is None else '*'}" for name, t in CALLED])
def test_arguments_are_written_alike_whether_they_come_as_an_object_or_as_json(of, written):
    """OpenAI keeps them as JSON: most templates would write that as a text in quotes, with every quote in it escaped."""
    found = []
    for arguments in ({"city": "Paris", "days": 3}, '{"city":"Paris","days":3}'):
        call = CALLS[0] | {"function": {"name": "weather", "arguments": arguments}}
        chat = [CALLING[0], {"role": "assistant", "content": None, "tool_calls": [call]}, *CALLING[2:]]
        conversation = content_of({"messages": chat, "tools": TOOLS}, DataSpec(train=("unused",)))
        [tokenized] = ChatTokenizer([side(*of)], True)([conversation])
        found.append(learned(tokenized, side(*of)))
    assert found[0] == found[1] and written in found[0]


def test_what_only_some_side_reads_is_told_once(tmp_path, two_tokenizers, capsys):
    """A template may know neither a role nor tools: the student would learn answers to what it is not told."""
    obeying = [{"role": "developer", "content": "Be brief."}, *PLAIN[:2]]
    knowing = side("qwen3", CHATML.replace("{% for", "{{ tools }}{% for", 1))
    deaf = side("qwen3", CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}"))
    found = read(obeying, knowing, deaf, tools=TOOLS)
    assert found.remarks == tuple(f"qwen3: its chat template leaves out {w}" for w in ("what the developer says", "the tools"))
    instructed = [{"role": "system", "content": " Be brief.\n"}, *THINKING]
    for of, chat, tools in (
        ("qwen3-chat", CALLING, TOOLS),
        ("gemma3-chat", instructed, None),
        ("llama3.1-chat", instructed, None),
    ):
        assert read(chat, side(of), tools=tools).remarks == ()  # escaped, moved or without its blanks it is there
    lost = "its chat template leaves out a part of the last answer: its reasoning, as a rule"
    strict = side("qwen3", CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"))  # as DeepSeek-R1's
    assert read(THINKING, strict).remarks == (f"qwen3: {lost}",) and read(PLAIN, strict).remarks == ()
    assert read(REASONED, side("llama3.1-chat")).remarks == (f"llama3.1-chat: {lost}",)
    assert read([*REASONED, *PLAIN[:2]], side("qwen3-chat")).remarks == read(REASONED, side("qwen3-chat")).remarks == ()
    nemo = read(instructed, side("nemo-chat")).remarks  # it puts the system prompt into a last question only
    assert nemo == ("nemo-chat: its chat template leaves out what the system says",)
    prepare_rows(two_tokenizers([{"messages": PLAIN, "tools": TOOLS}] * 3), tmp_path / "rows")
    told = [line for line in capsys.readouterr().err.splitlines() if "leaves out" in line]
    file, both = tmp_path / "chats.jsonl", ("student", "teacher other")
    assert told == [f"warning: {file}:1: {name}: its chat template leaves out the tools" for name in both]


def test_what_the_prompt_of_an_answer_writes_is_no_target_where_the_turn_goes_on_otherwise():
    """In an earlier turn there is no reasoning, but the role before the answer is still the template's."""
    of = side("qwen3", THINKING_PROMPT)
    found = read([*PLAIN[:2], *REASONED], of)
    assert learned(found, of) == f"{PLAIN[1]['content']}<|im_end|>Two and two.\n</think>\n\nIt is 4.<|im_end|>"


def test_names_of_special_tokens_in_a_message_stay_text():
    chat = [{"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "It <|im_end|> ends, </s> too."}]
    sides = side("qwen3-chat"), side("mistral", INST)
    found = read(chat, *sides)
    assert not isinstance(found, str), found
    for of, ids, end in zip(sides, found.ids, ("<|im_end|>", "</s>")):
        assert of.tokenizer.decode(ids) == of.tokenizer.apply_chat_template(chat, tokenize=False)
        assert (ids == of.tokenizer.convert_tokens_to_ids(end)).sum() == (2 if end == "<|im_end|>" else 1)
    assert found.chunks[0][2].all() and len(found.chunks[0][2]) > 8


def test_the_end_of_a_turn_is_a_target_behind_a_line_break_too():
    of = side("tiny", NEWLINE_EOS)
    found = read([PLAIN[0], {"role": "assistant", "content": "A river"}], of)
    assert learned(found, of) == "A river\n<eos>"


def test_turns_of_channels_end_with_the_token_that_the_template_puts():
    of = side("harmony", HARMONY)
    chat = [*CALLING, {"role": "user", "content": "Sure?"}, *REASONED[1:]]
    assert learned(read(chat, of, tools=TOOLS), of) == (
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris", "days": 3}<|call|>'
        "<|channel|>final<|message|>It is sunny.<|end|>"
        "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"
    )


def test_a_turn_ends_where_it_does_though_its_last_words_are_escaped():
    """Qwen3 renders the calling turn in another form where it is the last one, and JSON has the argument not as it is."""
    asked = {"id": "b", "type": "function", "function": {"name": "time", "arguments": {"q": 'a "quoted"\nline'}}}
    chat = [CALLING[0], CALLING[1] | {"content": "I see.", "tool_calls": [*CALLS, asked]}, *CALLING[2:]]
    said = learned(read(chat, side("qwen3-chat"), tools=TOOLS), side("qwen3-chat"))
    assert (
        said.startswith("I see.\n<tool_call>")
        and 'line"}}\n</tool_call><|im_end|>' in said
        and said.endswith("It is sunny.<|im_end|>")
    )


def test_a_message_can_be_left_out():
    of = side("qwen3-chat")
    chat = copy.deepcopy(PLAIN)
    for leave_out in ({"train": False}, {"weight": 0}):
        marked = [*chat[:1], chat[1] | leave_out, *chat[2:]]
        said = learned(read(marked, of), of)
        assert "42" not in said and said.endswith("user\n<|im_end|>") and said.count("<|im_end|>") == 1


def test_every_message_is_a_target_without_assistant_only():
    sides = side("qwen3", CHATML), side("mistral", INST)
    found = read(PLAIN, *sides, assistant_only=False)
    assert learned(found, sides[0]).count("<|im_end|>") == 4 and "What is 12" in learned(found, sides[0])


def test_what_a_template_cannot_do_is_said():
    system = [{"role": "system", "content": "Be kind."}, *PLAIN]
    mistral = side("mistral", INST)
    assert read(system, side("qwen3", CHATML), mistral) == "mistral: its chat template refuses it: no system here"
    rewritten = read(PLAIN, side("qwen3", SHOUTING))
    assert rewritten == "qwen3: its chat template leaves out or rewrites what the assistant says"
    calling = [
        CALLING[0],
        CALLING[1] | {"content": None},
        *CALLING[2:],
    ]  # of which SmolLM2's asks for the content, and knows no calls
    assert read(calling, side("smollm2")) == "smollm2: its chat template leaves out or rewrites what the assistant says"
    only_last = "{{ messages[-1].content }}"
    assert "leaves out" in read(PLAIN, side("qwen3", only_last))
    assert read([], mistral) == "no text"


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] + 1 }}", {"tool_use": "{{ messages }}"}], ids=["broken", "no default"]
)
def test_a_template_that_fails_names_its_side(template):
    tok = copy.copy(assets.tokenizer("mistral"))
    tok.chat_template = template
    with pytest.raises(InputError, match="^teacher odd: its chat template refuses it: "):
        ChatTokenizer([Side.of("teacher odd", "t0", tok)], True)


def test_no_template_is_an_error():
    bare = Side.of("teacher bare", "teacher_0", tiny_tokenizer(300))
    with pytest.raises(InputError, match="teacher bare: its tokenizer has no chat template"):
        ChatTokenizer([side("qwen3", CHATML), bare], True)


def test_cuts_stand_at_the_same_place_of_every_side():
    sides = side("qwen3-chat"), side("llama3.1-chat"), side("mistral", INST)
    found = read(PLAIN, *sides)
    assert found.cuts[0].tolist() == [0, 0, 0] and found.cuts[-1].tolist() == [len(ids) for ids in found.ids]
    assert (np.diff(found.cuts, axis=0) >= 0).all() and len(found.cuts) > 8
    answered = [
        np.cumsum(np.concatenate([[0], widths * targets]))[cut]
        for widths, targets, cut in zip(found.widths, found.targets, found.cuts.T)
    ]
    assert answered[0].tolist() == answered[1].tolist() == answered[2].tolist()


def test_a_long_chat_keeps_its_beginning_and_needs_a_target():
    sides = side("qwen3-chat"), side("llama3.1-chat")
    found = read(PLAIN, *sides)
    sizes = [len(ids) for ids in found.ids]
    [row] = document_rows(found, [sizes[0] - 8, sizes[1]], [Side.of("a", "student", sides[0].tokenizer), sides[1]], whole=True)
    assert row["student_mask"].sum() > 0 and row["num_bytes"] < sum(found.widths[0])
    assert document_rows(found, [12, 12], sides, whole=True) == "no target within data.max_length"


@pytest.fixture
def two_tokenizers(tmp_path):
    for name, template in (("student", CHATML), ("other", CHATML.replace("im_", "turn_"))):
        tok = tiny_tokenizer(300 if name == "student" else 400)
        tok.chat_template = template
        tok.save_pretrained(tmp_path / name)

    def spec(lines, **data):
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return DistillationSpec.from_text(
            json.dumps(
                {
                    "name": "chat",
                    "student": {"model": str(tmp_path / "student")},
                    "teachers": [{"id": "other", "model": str(tmp_path / "other"), "projection": {}}],
                    "data": {"train": [str(tmp_path / "chats.jsonl")], **data},
                    "output": {"uri": "unused"},
                }
            )
        )

    return spec


def test_prepare_chats(tmp_path, two_tokenizers):
    lines = [{"talk": PLAIN}, {"talk": PLAIN[:1]}, {"talk": PLAIN[:2]}, {"talk": None}, {"talk": "hello"}]
    stats = prepare_rows(two_tokenizers(lines, format="messages", messages_key="talk"), tmp_path / "rows")
    dropped = {NO_TARGET: 1, "no text": 1, "'talk' is not a list of messages with a role": 1}
    assert stats.rows == 2 and stats.dropped_documents == dropped and stats.unusable_documents == 1
    row = load_rows(tmp_path / "rows")[0]
    covered = row["student_bytes"][row["student_mask"] > 0].sum()
    assert covered == sum(len(m["content"].strip().encode()) for m in PLAIN if m["role"] == "assistant")


def test_cut_conversations_are_counted(tmp_path, two_tokenizers):
    long = [*PLAIN[:1], {"role": "assistant", "content": "word " * 200}]
    stats = prepare_rows(two_tokenizers([{"messages": long}, {"messages": PLAIN[:2]}], max_length=150), tmp_path / "rows")
    assert stats.cut_documents == 1 and stats.rows == 2


def test_too_many_conversations_that_cannot_be_used_are_an_error(tmp_path, two_tokenizers, capsys):
    bad = [{"role": "user", "content": 3}]
    with pytest.raises(
        InputError, match=r"^data.train: 2 of 3 documents cannot be used, 2 since a message's content .*chats.jsonl:1\)$"
    ):
        prepare_rows(two_tokenizers([{"messages": bad}, {"messages": bad}, {"messages": PLAIN}]), tmp_path / "rows")
    assert capsys.readouterr().err.count("left out: a message's content is neither text nor a list of text parts") == 1


def test_images_are_refused_by_name(tmp_path, two_tokenizers):
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "What?"}]}]
    for line, word in (({"messages": picture}, "image_url"), ({"messages": PLAIN, "images": ["a.png"]}, "'images'")):
        with pytest.raises(InputError, match=f"chats.jsonl:1: .*{word}.*only text can be distilled"):
            prepare_rows(two_tokenizers([line]), tmp_path / "rows")
