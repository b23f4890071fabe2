"""Chats: contents align, templates do not, and only the wanted turns are targets."""

import copy
import json
from functools import cache

import numpy as np
import pytest

from tests.support import assets
from tests.support.tiny import tiny_tokenizer
from xtoken_core.data.chat import ChatTokenizer, template_parts
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.data.reading import load_rows
from xtoken_core.data.rows import Side, Tokenized, document_rows
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "What is 12 + 30?\n"},
    {"role": "assistant", "content": " It is 42, naïve <|im_end|></s> asker! 日本"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "Bye."},
]


@cache
def sides(*templates: str) -> tuple[Side, ...]:
    """A byte-level student without BOS, and a SentencePiece teacher with prefix space and BOS."""
    found = []
    for name, column, which, template in zip(
        ("student", "teacher mistral"), ("student", "teacher_0"), ("qwen3", "mistral"), templates or (CHATML, INST)
    ):
        tok = copy.deepcopy(assets.tokenizer(which))
        tok.chat_template = template
        found.append(Side.of(name, column, tok))
    return tuple(found)


def chat(messages=CHAT, assistant_only=True, templates=()) -> Tokenized | str:
    [found] = ChatTokenizer(sides(*templates), assistant_only)([messages])
    return found


def pieces(found: Tokenized, side: int) -> list[str]:
    """The token strings of one side."""
    return sides()[side].tokenizer.convert_ids_to_tokens(found.ids[side])


@pytest.mark.parametrize("assistant_only", [True, False])
def test_contents_align_and_templates_do_not(assistant_only):
    found = chat(assistant_only=assistant_only)
    wanted = [m["content"].strip().encode() for m in CHAT if m["role"] == "assistant" or not assistant_only]
    [(*chunk_ids, exact)] = found.chunks
    assert exact.all()
    texts = []
    for side, ids, widths, targets, chunk_id in zip(sides(), found.ids, found.widths, found.targets, chunk_ids):
        spelled = [side.table[i][len(side.table[i]) - w :] for i, w in zip(ids.tolist(), widths.tolist())]
        inside = chunk_id >= 0
        assert b"".join(t for t, c in zip(spelled, inside) if c) == b"".join(wanted)
        texts.append([b"".join(t for t, c in zip(spelled, chunk_id) if c == k) for k in range(len(exact))])
        # the targets are the contents and the special token that ends each of them
        ends = (targets > 0) & ~inside
        assert ends.sum() == (2 if assistant_only or side.name != "student" else 4)
        assert all(side.table.special[i] for i in ids[ends])
        assert (targets[inside] == 1).all()
    assert texts[0] == texts[1] and all(texts[0])
    assert chunk_ids[0].max() + 1 == chunk_ids[1].max() + 1 == len(exact)


def test_a_special_token_spelled_out_in_a_content_is_text():
    found = chat()
    assert pieces(found, 0).count("<|im_end|>") == 4 and pieces(found, 1).count("</s>") == 2


def test_tokens_are_those_of_the_rendered_chat():
    plain = [{"role": m["role"], "content": c} for m, c in zip(CHAT, ["Hello there", "It is 42.", "Why?", "Bye."])]
    found = chat(plain)
    for side, ids in zip(sides(), found.ids):
        text = side.tokenizer.apply_chat_template(plain, tokenize=False)
        assert ids.tolist() == side.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_cuts_stand_at_the_same_place_of_every_side():
    found = chat()
    assert found.cuts[0].tolist() == [0, 0] and found.cuts[-1].tolist() == [len(ids) for ids in found.ids]
    assert (np.diff(found.cuts, axis=0) >= 0).all()
    content = [np.cumsum(np.concatenate([[0], widths]))[cut] for widths, cut in zip(found.widths, found.cuts.T)]
    assert content[0].tolist() == content[1].tolist()  # so many bytes of contents lie before each cut


def test_a_long_chat_keeps_its_beginning_and_needs_a_target():
    found = chat()
    sizes = [len(ids) for ids in found.ids]
    [row] = document_rows(found, [sizes[0] - 8, sizes[1]], sides(), whole=True)
    assert row["student_mask"].sum() > 0 and row["num_bytes"] < sum(found.widths[0])
    assert document_rows(found, [12, 12], sides(), whole=True) == "no target within data.max_length"


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] + 1 }}", {"tool_use": "{{ messages }}"}], ids=["broken", "no default"]
)
def test_a_template_that_fails_names_its_side(template):
    tok = copy.deepcopy(assets.tokenizer("mistral"))
    tok.chat_template = template
    with pytest.raises(InputError, match="^teacher odd: its chat template fails: "):
        template_parts(Side.of("teacher odd", "t0", tok), ["user"])


def test_what_a_template_cannot_do_is_said():
    system = [{"role": "system", "content": "Be kind."}, *CHAT]
    assert (
        chat(system)
        == "teacher mistral: its chat template refuses the roles system, user, assistant, user, assistant: no system here"
    )
    last = "{{ messages[-1].content }}"
    assert "leaves out, repeats or reorders" in template_parts(sides(last, INST)[0], ("user", "assistant"))
    assert chat([]) == "no text"


def test_no_template_is_an_error():
    bare = Side.of("teacher bare", "teacher_0", tiny_tokenizer(300))
    with pytest.raises(InputError, match="teacher bare: its tokenizer has no chat template"):
        ChatTokenizer([sides()[0], bare], True)


def test_prepare_chats(tmp_path):
    for name, template in (("student", CHATML), ("other", CHATML.replace("im_", "turn_"))):
        tok = tiny_tokenizer(300 if name == "student" else 400)
        tok.chat_template = template
        tok.save_pretrained(tmp_path / name)
    lines = [{"talk": CHAT}, {"talk": CHAT[:1]}, {"talk": CHAT[:2]}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    data = {"train": [str(tmp_path / "chats.jsonl")], "format": "messages", "messages_key": "talk"}
    spec = {
        "name": "chat",
        "student": {"model": str(tmp_path / "student")},
        "teachers": [{"id": "other", "model": str(tmp_path / "other"), "projection": {}}],
        "data": data,
        "output": {"uri": "unused"},
    }
    stats = prepare_rows(DistillationSpec.from_text(json.dumps(spec)), tmp_path / "rows")
    assert stats.rows == 2 and stats.dropped_documents == {"no target within data.max_length": 1}
    row = load_rows(tmp_path / "rows")[0]
    covered = row["student_bytes"][row["student_mask"] > 0].sum()
    assert covered == sum(len(m["content"].strip().encode()) for m in CHAT if m["role"] == "assistant")

    for bad in ({"talk": [{"role": "user", "content": None}]}, {"talk": "hello"}, {"talk": [["user", "hi"]]}):
        (tmp_path / "chats.jsonl").write_text(json.dumps(bad))
        with pytest.raises(InputError, match=r"chats.jsonl:1: 'talk' is no list of messages"):
            prepare_rows(DistillationSpec.from_text(json.dumps(spec)), tmp_path / "rows")
    (tmp_path / "chats.txt").write_text("hello")
    spec["data"]["train"] = [str(tmp_path / "chats.txt")]
    with pytest.raises(InputError, match="chats .* come as .jsonl or .parquet"):
        prepare_rows(DistillationSpec.from_text(json.dumps(spec)), tmp_path / "rows")
