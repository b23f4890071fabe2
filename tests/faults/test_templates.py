"""Chat templates that never end or fill the memory: one line, within 10 s of processor time a rendering; and nothing of them stays."""

from __future__ import annotations

import json
import os
import signal

import psutil
import pytest

from tests.support.chat_templates import CHATML
from tests.support.tiny import tiny_model, tiny_tokenizer
from xtoken_core import bounded
from xtoken_core.bounded import Bounded, Overrun, Refused
from xtoken_core.data.chat import ChatTokenizer
from xtoken_core.data.records import Conversation
from xtoken_core.data.rows import Side
from xtoken_core.data.templates import MOST_OVERRUNS
from xtoken_core.errors import InputError
from xtoken_core.evaluation.samples import answer
from xtoken_core.models import load_model
from xtoken_core.tokenization import TokenTable, load_tokenizer

LOOPS = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
HOSTILE = {
    "nested loops": (LOOPS, "it does not end within 0.3 s"),
    "one operation on a huge number": ("{{ (7 ** 9999999) ** 99 }}", "it does not end within 0.3 s"),
    "a text of 100 GB": ("{{ 'x' * 10 ** 11 }}", "it needs more than 1024 MiB"),
    "a text that doubles": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "it needs more than 1024 MiB",
    ),
    "a number 100 GB wide": ("{{ '%099999999999d' % 1 }}", "it needs more than 1024 MiB"),
    "a text of 100 million characters": ("{{ 'x' * 10 ** 8 }}", "it writes more than 67108864 characters"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
}
CHAT = [{"role": "user", "content": "Say A."}, {"role": "assistant", "content": "A river"}]


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.3)


def tokenizer(template: str):
    tok = tiny_tokenizer(400)
    tok.chat_template = template
    return tok


def side(template: str) -> Side:
    return Side.of("teacher odd", "t0", tokenizer(template))


@pytest.mark.parametrize("what", HOSTILE)
def test_a_template_beyond_its_bounds_is_one_line(what, monkeypatch, fault):
    template, message = HOSTILE[what]
    if "end" not in message:
        monkeypatch.setattr(bounded, "SECONDS", 10.0)
    run = Bounded(tokenizer(template).apply_chat_template)
    with pytest.raises(Refused) as told:
        run(CHAT, tokenize=False)
    assert str(told.value).startswith(message)
    run.close()
    assert psutil.Process().children() == [c for c in psutil.Process().children() if c.pid != run._copy]
    fault(f"a chat template: {what}", "one line within 10 s", told.value)


def test_an_interrupted_call_leaves_no_answer_to_the_next_one(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    run = Bounded(str.upper)
    assert run("a") == "A"
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(run._pipe, "recv", interrupt)
        run("first")
    assert run("second") == "SECOND"
    run.close()


def test_it_is_known_when_its_tokenizer_is_read(tmp_path, fault):
    """By a run on plain texts too: what ends a turn is asked of the template."""
    model = tiny_model(tmp_path / "model", 400)
    told = json.loads((model / "tokenizer_config.json").read_text()) | {"chat_template": LOOPS}
    (model / "tokenizer_config.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=f"^{model}: its chat template: it does not end within 0.3 s$") as refused:
        TokenTable.from_tokenizer(load_tokenizer(str(model)))
    fault("a tokenizer's chat template does not end", "one line when the tokenizer is read", refused.value)


def test_of_chats_that_cost_a_template_too_much_a_few_are_left_out(fault):
    """A chat may be what is wrong, so that some may be left out; each takes its time, so that more of them end the run."""
    loops = "{% if 'bomb' in messages[0].content %}" + LOOPS + "{% endif %}" + CHATML
    chats = ChatTokenizer([side(loops)], True)
    good, bomb = Conversation(CHAT), Conversation([{"role": "user", "content": "bomb"}, CHAT[1]])
    one, reason, other = chats([good, bomb, good])
    assert reason == "teacher odd: its chat template: it does not end within 0.3 s" and not isinstance(one, str)
    assert one.ids[0].tolist() == other.ids[0].tolist()
    with pytest.raises(
        InputError, match=f"^teacher odd: its chat template: it does not end within 0.3 s, on {MOST_OVERRUNS + 1} chats$"
    ) as told:
        chats([bomb] * MOST_OVERRUNS)
    fault("chats that make a template loop for ever", "left out and counted, the fourth ends the run", told.value)


def test_a_message_that_the_template_refuses_is_one_line_in_a_chat(tmp_path):
    tok = tokenizer("{{ raise_exception('users are not served') }}")
    with pytest.raises(InputError, match="its chat template refuses a message of a user: users are not served$"):
        answer(load_model(str(tiny_model(tmp_path / "model", 400))), tok, "Hello", 4)


def test_calls_are_those_of_the_function_and_outlive_a_copy_that_is_killed():
    run = Bounded(lambda text, times=1: text * times)
    assert [run("ab"), run("c", times=3)] == ["ab", "ccc"]
    copy = psutil.Process(run._copy)
    os.kill(copy.pid, signal.SIGKILL)
    with pytest.raises(Overrun):
        run("ab")
    assert run("ab") == "ab" and run._copy != copy.pid
    again = psutil.Process(run._copy)
    run.close()
    assert not again.is_running()


def test_a_copy_ends_with_its_process():
    """It holds no end of the pipe that would keep it alive, nor any other file of the process."""
    ours, theirs = os.pipe()
    run = Bounded(lambda: " ".join(str(f) for f in sorted(int(f) for f in os.listdir("/proc/self/fd"))))
    held = [int(f) for f in run().split()]
    assert ours not in held and theirs not in held and len(held) <= 5
    copy = psutil.Process(run._copy)
    run._pipe.close()
    copy.wait(10)
    os.close(ours)
    os.close(theirs)
