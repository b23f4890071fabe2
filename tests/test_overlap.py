"""Overlap of real vocabularies, the audit by class, and the mode of each teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pipelines.__main__ import cli
from tests.support import assets
from tests.support.tiny import tiny_tokenizer
from tests.test_alignment import make_table
from xtoken_core.errors import InputError
from xtoken_core.modes import mode_of
from xtoken_core.overlap import CLASSES, Coverage, audit, overlap_matrix, token_classes, vocabulary_overlap
from xtoken_core.report.overlap_figure import overlap_figure
from xtoken_core.results.vocabulary import ClassCoverage, OverlapReport, TokenizerComparison
from xtoken_core.same_vocabulary import check_same_vocabulary
from xtoken_core.spec import DistillationSpec, TeacherSpec
from xtoken_core.tokenization import TokenTable
from xtoken_core.workflow.vocabularies import compare_tokenizers, overlap_report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("a", "b", "coefficient"),
    [
        ("llama3", "qwen3", 0.8560),
        ("llama3", "gemma3", 0.6753),
        ("llama3", "o200k", 0.8066),
        ("qwen3", "gemma3", 0.6329),
        ("qwen3", "o200k", 0.6519),
        ("gemma3", "o200k", 0.6552),
    ],
)
def test_overlap_of_real_vocabularies(a: str, b: str, coefficient: float) -> None:
    found = vocabulary_overlap(assets.table(a), assets.table(b))
    assert round(found.coefficient, 4) == coefficient
    assert found == vocabulary_overlap(assets.table(b), assets.table(a))
    assert found.shared == sum(token in assets.table(b).ids_by_bytes for token in assets.table(a).ids_by_bytes)


def test_overlap_counts_distinct_bytes_of_ordinary_tokens() -> None:
    left = make_table([b"a", b"b", b"b", b"<s>"], special=(3,))
    right = make_table([b"b", b"c", b"d", b"<s>"], special=(3,))
    assert (vocabulary_overlap(left, right).shared, vocabulary_overlap(left, right).coefficient) == (1, 0.5)
    assert vocabulary_overlap(left, make_table([])).coefficient == 0.0


def test_classes_of_tokens() -> None:
    expected = {
        b"12": ["digits", "two_digit_numbers"],
        b"123": ["digits", "three_digit_numbers"],
        b"1": ["digits", "single_character"],
        b" 7": ["digits"],
        b" the": ["letters"],
        "ña".encode(): ["letters"],
        b"  \n": ["whitespace"],
        b" ": ["whitespace", "single_character"],
        b" !=": ["punctuation"],
        b"x1": ["other"],
        b"\xe4\xb8": ["other"],
        "中".encode(): ["letters", "single_character"],
        "١٢".encode(): ["digits"],  # not the ASCII numbers
    }
    assert {token: token_classes(token) for token in expected} == expected


def test_audit_counts_by_class() -> None:
    coverage = audit(make_table([b"12", b"34", b" a", b"b", b"!"]), make_table([b"12", b" a", b"z"]))
    assert list(coverage) == list(CLASSES)
    assert coverage["two_digit_numbers"] == Coverage(2, 1) and coverage["letters"] == Coverage(2, 1)
    assert coverage["punctuation"] == Coverage(1, 0) and coverage["three_digit_numbers"].share == 1.0
    partition = CLASSES[:5]
    assert sum(coverage[name].tokens for name in partition) == 5


@pytest.mark.parametrize(
    ("teacher", "asked", "mode"),
    [
        ({"projection": {"learnable": True}}, "auto", "p_kl"),
        ({"projection": {}}, "auto", "partition_kl"),
        ({"projection": {}}, "h_kl", "h_kl"),
        ({"projection": {}, "mode": "gold"}, "auto", "gold"),
        ({}, "h_kl", "same_vocabulary"),
    ],
)
def test_the_mode_of_a_teacher_and_why(teacher, asked, mode) -> None:
    found, reason = mode_of(TeacherSpec.model_validate({"id": "t", "model": "m"} | teacher), asked)
    assert found == mode and ("worse than no distillation" in reason) == (mode in ("h_kl", "gold"))


def spec(*teachers: dict) -> DistillationSpec:
    return DistillationSpec.from_text(
        json.dumps(
            {
                "name": "test",
                "student": {"model": "student", "tokenizer": str(assets.tokenizer_folder("gpt2"))},
                "teachers": [{"model": "teacher", **teacher} for teacher in teachers],
                "data": {"train": ["x"]},
                "output": {"uri": "x"},
            }
        )
    )


def test_report_of_a_spec() -> None:
    gpt2, mistral = (str(assets.tokenizer_folder(name)) for name in ("gpt2", "mistral"))
    report = overlap_report(
        spec(
            {"id": "other", "tokenizer": mistral, "projection": {}},
            {"id": "same", "tokenizer": gpt2},
            {"id": "set", "tokenizer": mistral, "projection": {}, "mode": "gold"},
        )
    )
    assert OverlapReport.model_validate_json(report.model_dump_json()) == report
    modes = {name: teacher.mode for name, teacher in report.teachers.items()}
    assert modes == {"other": "partition_kl", "same": "same_vocabulary", "set": "gold"}
    other = report.teachers["other"]
    assert report.teachers["set"].reason == "set in the spec, and worse than no distillation where it was measured: gold"
    assert other.coverage["two_digit_numbers"] == ClassCoverage(tokens=100, covered=0, share=0.0)
    assert other.size == 32000 and report.student.fingerprint == assets.SOURCES["gpt2"].fingerprint
    c = vocabulary_overlap(assets.table("gpt2"), assets.table("mistral")).coefficient
    assert report.matrix.names == ["student", "other", "same", "set"]
    assert report.matrix.coefficient == [[1, c, 1, c], [c, 1, c, 1], [1, c, 1, c], [c, 1, c, 1]]


def test_a_teacher_of_another_vocabulary_needs_a_projection() -> None:
    with pytest.raises(InputError) as caught:
        overlap_report(spec({"id": "other", "tokenizer": str(assets.tokenizer_folder("mistral"))}))
    for part in (
        "teachers.0 (other)",
        "ids differ (student against teacher): 0 ('!' against no text), 1 (",
        "add `projection: {}`",
    ):
        assert part in str(caught.value)


def changed(size: int, *special: str, added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with more special and other added tokens."""
    tok = tiny_tokenizer(size)
    tok.add_special_tokens({"additional_special_tokens": list(special)} if special else {})
    tok.add_tokens(list(added))
    return tok


@pytest.mark.parametrize(
    ("student", "teacher", "parting"),
    [
        (changed(400), changed(400, "<pad>"), None),
        (changed(400, "<pad>"), changed(400), None),
        (changed(400, "<a>", "<b>"), changed(400, "<c>"), None),
        (changed(400), changed(400, added=("tool",)), r"400 \(no text against 'tool'\);"),
        (changed(400, added=("tool",)), changed(400, "<pad>"), r"400 \('tool' against no text\);"),
        (changed(400), changed(380), r"380 \('.*' against no text\), 381 .* and 17 more;"),
        (changed(380), changed(400), r"380 \(no text against '.*'\), 381 .* and 17 more;"),
    ],
)
def test_ids_that_stand_for_no_text_do_not_part_a_family(student, teacher, parting) -> None:
    if parting is None:
        check_same_vocabulary(student, teacher, "teachers.0 (t)")
        return
    with pytest.raises(InputError, match=rf"^teachers\.0 \(t\): no projection, .*: {parting} add `projection: {{}}`$"):
        check_same_vocabulary(student, teacher, "teachers.0 (t)")


def test_padding_that_an_origin_writes_as_tokens_does_not_part_a_family() -> None:
    """Converters from GGUF write a vocabulary's unused ids as ordinary tokens that no merge reaches."""
    padded = tiny_tokenizer(400)
    content = json.loads(padded.backend_tokenizer.to_str())
    content["model"]["vocab"] |= {f"[PAD{i}]": i for i in range(400, 416)}
    padded = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<eos>")
    assert len(TokenTable.from_tokenizer(padded)) == 416
    check_same_vocabulary(tiny_tokenizer(400), padded, "t")


def test_heat_map() -> None:
    tables = [make_table([b"a", b"b"]), make_table([b"b", b"c", b"d"]), make_table([b"c"])]
    matrix = overlap_matrix(tables)
    assert matrix.tolist() == [[1.0, 0.5, 0.0], [0.5, 1.0, 1.0], [0.0, 1.0, 1.0]]
    axes = overlap_figure(["a", "b", "c"], matrix).axes[0]
    assert [text.get_text() for text in axes.texts] == [
        "1.000",
        ".500",
        ".000",
        ".500",
        "1.000",
        "1.000",
        ".000",
        "1.000",
        "1.000",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]


def test_many_tokenizers_at_once(tmp_path: Path) -> None:
    names = ["smollm2", "mistral", "gpt2"]
    found = compare_tokenizers([str(assets.tokenizer_folder(name)) for name in names], tmp_path / "out")
    assert found == TokenizerComparison.read(tmp_path / "out/overlap.json")
    assert found.names == names and found.fingerprints == [assets.SOURCES[name].fingerprint for name in names]
    pairs = [[vocabulary_overlap(assets.table(a), assets.table(b)).coefficient for a in names] for b in names]
    assert found.coefficient == [[round(c, 4) for c in row] for row in pairs]
    assert (tmp_path / "out/overlap.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_that_compares(tmp_path: Path) -> None:
    folders = [str(assets.tokenizer_folder(name)) for name in ("mistral", "gpt2")]
    result = CliRunner().invoke(cli, ["tokenizers", *folders, "--output", str(tmp_path)], catch_exceptions=False)
    coefficient = vocabulary_overlap(assets.table("mistral"), assets.table("gpt2")).coefficient
    assert result.output == f"mistral 1.0000 {coefficient:.4f}\ngpt2    {coefficient:.4f} 1.0000\n"
    assert (tmp_path / "overlap.png").exists()
