"""What the models' configurations say against the spec, found by the resolve step."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from tests.support.architectures import tiny_config
from tests.support.chat_templates import CHATML
from tests.support.tiny import tiny_tokenizer
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.model_checks import check_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder per architecture with its config.json and a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gpt2", "gpt_oss", "bloom", "deepseek_v3", "gemma3n_text"):
        tiny_config(kind, vocab_size=300).save_pretrained(root / kind)
        tiny_tokenizer(300).save_pretrained(root / kind)
    tiny_config("llama", vocab_size=300).save_pretrained(root / "more ids than rows")
    tiny_tokenizer(301).save_pretrained(root / "more ids than rows")
    return root


def spec_of(folders, student_kind: str, teacher_kind: str, **sections) -> DistillationSpec:
    values = {
        "name": "s",
        "student": {"model": str(folders / student_kind)} | sections.pop("student", {}),
        "teachers": [{"id": "t", "model": str(folders / teacher_kind)}],
        "data": {"train": ["x"], "max_length": 32} | sections.pop("data", {}),
        "output": {"uri": "o"},
    }
    return DistillationSpec.model_validate(values | sections)


@pytest.mark.parametrize(
    ("student", "teacher", "sections"),
    [
        ("llama", "gpt_oss", {}),
        ("bloom", "gpt2", {"data": {"max_length": 64}}),
        ("bloom", "bloom", {"data": {"max_length": 4096}}),
        ("deepseek_v3", "llama", {"student": {"keep_layers": 3}}),
    ],
)
def test_models_that_fit_pass(folders, student, teacher, sections):
    check_models(spec_of(folders, student, teacher, **sections))


@pytest.mark.parametrize(
    ("student", "teacher", "sections", "message"),
    [
        ("gpt2", "llama", {"data": {"max_length": 65}}, r"data\.max_length: 65 tokens a row, but student\.model \(.*gpt2\) has 64 pos"),
        ("bloom", "gpt2", {"data": {"max_length": 65}}, r"data\.max_length: 65 tokens a row, but teachers\.t\.model \(.*gpt2\) has 64"),
        ("llama", "gpt2", {"evaluation": {"window": 65}}, r"evaluation\.window: 65 tokens a row, but student\.model"),
        ("llama", "gpt_oss", {"training": {"attention": "sdpa"}}, r"training\.attention: .*gpt_oss \(GptOssForCausalLM\) has no sdpa"),
        ("more ids than rows", "llama", {}, r"student\.model: .*: its lm_head has 300 rows, fewer than the 301 ids that it is to read"),
        ("llama", "more ids than rows", {}, r"teachers\.0 \(t\): no projection, .* 300 \(no text against '.*'\); add"),
        ("llama", "absent", {}, r"teachers\.t\.model: .*absent: cannot load the model: no such file or folder"),
        ("llama", "llama", {"student": {"keep_layers": 5}}, r"student\.keep_layers: 5 layers asked for, the model has 4"),
        ("gemma3n_text", "llama", {"student": {"keep_layers": 3}}, r"student\.keep_layers: Gemma3nForCausalLM cannot be pruned so"),
    ],
)  # fmt: skip
def test_a_contradiction_names_field_and_model(folders, student, teacher, sections, message):
    with pytest.raises(InputError, match=f"^{message}[^\n]*$"):
        check_models(spec_of(folders, student, teacher, **sections))


@pytest.mark.parametrize(
    ("student", "teacher", "sections", "chats", "refused"),
    [
        (
            "llama",
            "talking",
            {},
            ["data.train"],
            r"student\.model: .*llama: .* no chat template, which the chats of data\.train need; stu",
        ),
        (
            "talking",
            "llama",
            {"projection": {}},
            ["data.validation"],
            r"teachers\.t\.model: .* of data\.validation need; teachers\.t\.tok",
        ),
        ("talking", "llama", {}, ["data.train"], None),  # which reads the student's rows
        (
            "talking",
            "llama",
            {},
            ["data.validation"],
            r"teachers\.t\.model: .* of data\.validation need",
        ),  # it is measured on them
        ("talking", "llama", {"texts": ["y"]}, ["data.validation"], None),
        ("talking", "llama", {"texts": ["y"]}, ["evaluation.texts"], r"teachers\.t\.model: .* of evaluation\.texts need"),
        ("talking", "llama", {"tokenizer": "talking", "texts": ["y"]}, ["data.train", "evaluation.texts"], None),
        ("llama", "llama", {"texts": ["y"], "bits_per_byte": False}, ["evaluation.texts"], None),
    ],
)
def test_chats_need_a_template_of_whoever_reads_them(folders, student, teacher, sections, chats, refused):
    """Else the evaluation after the training ends the run."""
    talking = tiny_tokenizer(300)
    talking.chat_template = CHATML
    tiny_config("llama", vocab_size=300).save_pretrained(folders / "talking")
    talking.save_pretrained(folders / "talking")
    own = {name: sections[name] for name in ("projection", "tokenizer") if name in sections}
    own |= {"tokenizer": str(folders / own["tokenizer"])} if "tokenizer" in own else {}
    spec = spec_of(
        folders,
        student,
        teacher,
        teachers=[{"id": "t", "model": str(folders / teacher), **own}],
        data={"validation": ["v"]},
        evaluation={name: sections[name] for name in ("texts", "bits_per_byte") if name in sections},
    )
    with nullcontext() if refused is None else pytest.raises(InputError, match=f"^{refused}[^\n]*$"):
        check_models(spec, chats)
