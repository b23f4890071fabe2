"""`show`: rows as people look at them."""

from __future__ import annotations

import json

from click.testing import CliRunner

from pipelines.__main__ import cli
from tests.support.chat_templates import CHATML, INST
from tests.support.tiny import tiny_tokenizer


def test_show_prints_what_each_tokenizer_reads(tmp_path):
    for name, size, template in (("student", 300, CHATML), ("other", 400, INST)):
        tok = tiny_tokenizer(size)
        tok.chat_template = template.replace("</s>", "<eos>")
        tok.save_pretrained(tmp_path / name)
    chat = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On the hill, à côté."}]
    lines = [{"messages": chat}, {"messages": [{"role": "system", "content": "x"}, *chat]}, {"text": "A plain text."}]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = {
        "name": "show",
        "student": {"model": str(tmp_path / "student")},
        "teachers": [
            {"id": "other", "model": str(tmp_path / "other"), "projection": {}},
            {"id": "same", "model": str(tmp_path / "student")},
        ],
        "data": {"train": [str(tmp_path / "mixed.jsonl")]},
        "output": {"uri": "unused"},
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    shown = CliRunner().invoke(cli, ["show", str(tmp_path / "spec.json")], env={"NO_COLOR": ""}, catch_exceptions=False)
    assert shown.exit_code == 0
    assert "<|im_start|>assistant\n\x1b[32mOn the hill, à côté.<|im_end|>\x1b[0m" in shown.output
    assert "<bos>[INST] Where is it? [/INST]\x1b[32m On the hill, à côté.<eos>\x1b[0m" in shown.output
    assert "mixed.jsonl:2: left out: teacher other: its chat template refuses it: no system here" in shown.output
    assert shown.output.count("\x1b[32mA plain text.<eos>\x1b[0m") == 2
    assert "teacher same: reads the student's tokens" in shown.output
    plain = CliRunner().invoke(cli, ["show", str(tmp_path / "spec.json"), "--rows", "1"], env={"NO_COLOR": "1"})
    assert "⟦On the hill, à côté.<|im_end|>⟧" in plain.output and "A plain text" not in plain.output
