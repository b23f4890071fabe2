"""The projection matrix: rows of real pairs, options, files of our own and of NeMo-RL."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support import assets
from tests.support.losses_cases import oracle_case
from xtoken_core.errors import InputError
from xtoken_core.losses import distillation_loss, reference
from xtoken_core.projection import Projection, build_projection, spell_vocabulary, write_projection
from xtoken_core.report.projection_summary import projection_block, projection_summary
from xtoken_core.results.vocabulary import ProjectionStats
from xtoken_core.spec import DistillationSpec, ProjectionSpec
from xtoken_core.workflow.vocabularies import write_projections

PAIRS = (("llama3", "qwen3"), ("smollm2", "gemma3"), ("mistral", "smollm2"), ("gpt2", "mistral"), ("llama2", "llama3"))
BUILT: dict[tuple[str, str], Projection] = {}


def build(student: str, teacher: str, **options) -> Projection:
    """W of a pair; built once with the default options."""
    if options or (student, teacher) not in BUILT:
        made = build_projection(assets.tokenizer(student), assets.tokenizer(teacher), ProjectionSpec(**options))
        if options:
            return made
        BUILT[student, teacher] = made
    return BUILT[student, teacher]


def row(projection: Projection, index: int) -> dict[int, float]:
    """The entries of one row, in order."""
    pairs = zip(projection.indices[index].tolist(), projection.weights[index].tolist(), strict=True)
    return {i: round(w, 4) for i, w in pairs if i >= 0}


def row_of(pair: tuple[str, str], token: bytes) -> dict[bytes, float]:
    teacher = assets.table(pair[1])
    return {teacher[i]: w for i, w in row(build(*pair), assets.table(pair[0]).ids_by_bytes[token]).items()}


def test_rows_known_from_the_paper() -> None:
    pair = ("llama3", "qwen3")
    assert row_of(pair, b"201") == {b"2": 0.9009, b"0": 0.0901, b"1": 0.009}
    assert row_of(pair, b"00") == {b"0": 1.0}  # twice the same piece
    assert row_of(pair, b"100") == {b"1": 0.9009, b"0": 0.0991}
    assert row_of(pair, b" the") == {b" the": 1.0}
    exact = build(*pair).exact
    ids = assets.table("llama3").ids_by_bytes
    assert exact[ids[b" the"]] and not exact[ids[b"00"]] and not exact[ids[b"201"]]
    assert exact.float().mean() >= 0.854


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_row(pair: tuple[str, str]) -> None:
    student, teacher, w = assets.table(pair[0]), assets.table(pair[1]), build(*pair)
    assert w.indices.shape == w.weights.shape == (len(student), 4) and w.teacher_vocab_size == len(teacher)
    assert w.indices.dtype == torch.int64 and w.weights.dtype == torch.float32
    pieces = spell_vocabulary(student, teacher, assets.tokenizer(pair[1]))
    per_row = (w.indices >= 0).sum(1)
    sums = w.weights.double().sum(1)
    assert torch.allclose(sums[per_row > 0], torch.ones(()).double(), atol=1e-6) and not w.weights[w.indices < 0].any()
    filled = w.indices >= 0
    assert (filled[:, :-1] >= filled[:, 1:]).all()  # no gaps
    lacking = {b for b in range(256) if bytes([b]) not in teacher.ids_by_bytes}
    roles = {i for role, i in student.roles.items() if role in teacher.roles}
    for i, token in enumerate(student.tokens):
        if student.special[i]:
            assert pieces[i] == [] and (per_row[i] > 0) == (i in roles)
        elif student.ids_by_bytes[token] != i:
            assert not student.ordinary[i] and per_row[i] == 0  # a byte or added token that repeats an ordinary one
        elif set(token) & lacking:
            assert not pieces[i] or token in teacher.ids_by_bytes
        else:
            assert teacher.decode(pieces[i]) == token
            assert list(row(w, i)) == list(dict.fromkeys(pieces[i][:4]))
            assert bool(w.exact[i]) == (token in teacher.ids_by_bytes) == (len(pieces[i]) == 1)


def test_weights_by_the_formula() -> None:
    pair, student = ("smollm2", "gemma3"), assets.table("smollm2")
    pieces = spell_vocabulary(student, assets.table("gemma3"), assets.tokenizer("gemma3"))
    some = np.flatnonzero([len(p) > 1 for p in pieces])[::97].tolist()
    assert len(some) > 20
    for i in some:
        expected: dict[int, float] = {}
        for place, piece in enumerate(pieces[i][:4]):
            expected[piece] = expected.get(piece, 0) + 0.9 * 0.1**place
        total = sum(expected.values())
        assert row(build(*pair), i) == pytest.approx({k: v / total for k, v in expected.items()}, abs=1e-4)


def test_bytes_that_are_no_text_go_through_byte_tokens() -> None:
    student, gemma = assets.table("smollm2"), assets.table("gemma3")
    broken = [i for i, t in enumerate(student.tokens) if len(t) > 1 and len(t.decode(errors="ignore").encode()) < len(t)]
    assert len(broken) > 10
    w = build("smollm2", "gemma3")
    for i in broken:
        ids = [j for j in w.indices[i].tolist() if j >= 0]
        assert gemma.decode(ids) == student[i][: len(gemma.decode(ids))]
        assert all("\ufffd" not in gemma[j].decode(errors="ignore") for j in ids)
    token = b"\xe2\x80"
    assert row_of(("smollm2", "gemma3"), token) == {b"\xe2": 0.9091, b"\x80": 0.0909}


def test_a_literal_low_block_is_not_a_space() -> None:
    llama, mistral = assets.table("llama3"), assets.table("mistral")
    block = llama.ids_by_bytes.get("▁".encode()) or llama.ids_by_bytes["\u2588".encode()]
    pieces = spell_vocabulary(llama, mistral, assets.tokenizer("mistral"))
    assert mistral.decode(pieces[block]) == llama[block]


def test_special_tokens_by_role_only() -> None:
    llama, qwen, w = assets.table("llama3"), assets.table("qwen3"), build("llama3", "qwen3")
    assert row(w, llama.roles["eos"]) == {qwen.roles["eos"]: 1.0} and w.exact[llama.roles["eos"]]
    assert row(w, llama.roles["bos"]) == {}  # Qwen has none
    assert row(w, llama.roles["pad"]) == {qwen.roles["pad"]: 1.0}
    specials = set(np.flatnonzero(qwen.special).tolist()) - set(qwen.roles.values())
    assert not specials & set(w.indices.unique().tolist())
    smollm2, gemma = assets.table("smollm2"), assets.table("gemma3")
    assert smollm2.roles["eos"] == smollm2.roles["pad"]  # the first common role counts
    assert row(build("smollm2", "gemma3"), smollm2.roles["eos"]) == {gemma.roles["eos"]: 1.0}


def test_top_k_cuts_before_it_normalises() -> None:
    w = build("llama3", "qwen3", top_k=2)
    token = assets.table("llama3").ids_by_bytes[b"201"]
    assert w.indices.shape[1] == 2 and list(row(w, token).values()) == [0.9091, 0.0909]
    assert build("llama3", "qwen3", top_k=1).weights.unique().tolist() == [0.0, 1.0]


def test_reverse_pass_by_the_definition() -> None:
    """From the pieces of both directions, row by row."""
    names = ("mistral", "smollm2")
    student, teacher = (assets.table(n) for n in names)
    w = build(*names, reverse_pass=True)
    forward = spell_vocabulary(student, teacher, assets.tokenizer(names[1]))
    backward = spell_vocabulary(teacher, student, assets.tokenizer(names[0]))
    expected: list[dict[int, float]] = [{} for _ in range(len(student))]
    for source, pieces in enumerate(forward):
        for place, piece in enumerate(pieces[:4]):
            expected[source][piece] = expected[source].get(piece, 0) + 0.9 * 0.1**place
    for target, pieces in enumerate(backward):
        for place, piece in enumerate(pieces[:4]):
            expected[piece][target] = expected[piece].get(target, 0) + 0.9 * 0.1**place
    changed = 0
    for i in range(300, len(student), 61):
        best = sorted(expected[i].values(), reverse=True)[:4]
        assert list(row(w, i).values()) == pytest.approx([v / sum(best) for v in best], abs=1e-4)
        changed += row(w, i) != row(build(*names), i)
        if w.exact[i]:
            assert teacher[w.indices[i, 0]] == student[i]
    assert changed > 20


def small() -> Projection:
    return Projection(
        torch.tensor([[1, 2], [0, -1], [-1, -1]]), torch.tensor([[0.75, 0.25], [1, 0], [0, 0]]), 3, torch.tensor([0, 1, 0]).bool()
    )


def equal(a: Projection, b: Projection) -> bool:
    return torch.equal(a.indices, b.indices) and torch.equal(a.weights, b.weights)


def test_keeps_the_tensors_it_is_given() -> None:
    weights = torch.ones(1, 1, requires_grad=True)
    indices = torch.zeros(1, 1, dtype=torch.int64)
    assert Projection(indices, weights).weights is weights and Projection(indices, weights).indices is indices


def test_save_and_load(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    small().save(file, "aa", "bb", {"top_k": 2})
    loaded = Projection.load(file, "aa", "bb")
    assert equal(loaded, small()) and loaded.teacher_vocab_size == 3 and torch.equal(loaded.exact, small().exact)
    with pytest.raises(InputError, match="student vocabulary aa, but this student's is cc"):
        Projection.load(file, "cc", "bb")
    with pytest.raises(InputError, match="teacher vocabulary bb, but this teacher's is cc"):
        Projection.load(file, "aa", "cc")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    small().save(file, "aa", "bb")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-5])
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"indices": torch.zeros(1, 1)}, tmp_path / "foreign.safetensors")
    Projection(torch.tensor([[5]]), torch.tensor([[1.0]]), 3).save(tmp_path / "range.safetensors", "aa", "bb")
    for name in ("cut", "text", "foreign", "range", "missing"):
        with pytest.raises(InputError, match=f"{name}.safetensors"):
            Projection.load(tmp_path / f"{name}.safetensors")


DAMAGES = {  # what is changed of a good file: tensors, header
    "teacher_vocab_size abc": ({}, {"teacher_vocab_size": "abc"}),
    "teacher_vocab_size of 30 digits": ({}, {"teacher_vocab_size": "9" * 30}),
    "teacher_vocab_size 0": ({}, {"teacher_vocab_size": "0"}),
    "another teacher's size": ({}, {"teacher_vocab_size": "49153"}),
    "another format version": ({}, {"format_version": "2"}),
    "no format": ({}, {"format": None}),
    "another student": ({}, {"student_fingerprint": "0" * 16}),
    "no fingerprint of the teacher": ({}, {"teacher_fingerprint": None}),
    "a teacher id beyond its vocabulary": ({"indices": lambda t: t.fill_(10**6)}, {"teacher_vocab_size": None}),
    "an id of -2": ({"indices": lambda t: t.fill_(-2)}, {}),
    "ids in floats": ({"indices": lambda t: t.float()}, {}),
    "no row has an entry": ({"indices": lambda t: t.fill_(-1), "weights": lambda t: t.zero_()}, {}),
    "fewer rows": ({name: lambda t: t[:-1] for name in ("indices", "weights", "exact")}, {}),
    "more rows": ({name: lambda t: torch.cat([t, t]) for name in ("indices", "weights", "exact")}, {}),
    "no entries per row": ({name: lambda t: t[:, :0] for name in ("indices", "weights")}, {}),
    "weights of another shape": ({"weights": lambda t: t[:, :1]}, {}),
    "rows that sum to 100": ({"weights": lambda t: t * 100}, {}),
    "one row that sums to 1/2": ({"weights": lambda t: t.index_fill(0, torch.tensor([300]), 0.125)}, {}),
    "negative weights": ({"weights": lambda t: -t}, {}),
    "NaN": ({"weights": lambda t: t.fill_(float("nan"))}, {}),
    "no weights": ({"weights": lambda t: None}, {}),
    "exact of 5 ids": ({"exact": lambda t: t[:5]}, {}),
    "exact of another shape": ({"exact": lambda t: torch.stack([t] * 3)}, {}),
    "exact in numbers": ({"exact": lambda t: t.float()}, {}),
    "every row exact": ({"exact": lambda t: torch.ones_like(t)}, {}),
    "exact turned round": ({"exact": lambda t: t.flip(0)}, {}),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_stored_w_is_held_to_what_it_claims(case: str, tmp_path: Path) -> None:
    tables = assets.table("mistral"), assets.table("smollm2")
    file = tmp_path / "w.safetensors"
    build("mistral", "smollm2").save(file, *(table.fingerprint for table in tables))
    Projection.load(file, *tables)
    with safe_open(file, "pt") as content:
        header, tensors = content.metadata(), {name: content.get_tensor(name) for name in ("indices", "weights", "exact")}
    changes, headers = DAMAGES[case]
    tensors |= {name: change(tensors[name].clone()) for name, change in changes.items()}
    header = {name: value for name, value in (header | headers).items() if value is not None}
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, file, header)
    with pytest.raises(InputError, match=r"^[^\n]*w\.safetensors: [^\n]+$"):
        Projection.load(file, *tables)


def test_nemo_rl_there_and_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "w.pt"
    small().to_nemo_rl(file)
    content = torch.load(file, weights_only=True)
    assert content["indices"].dtype == torch.int64 and content["likelihoods"].dtype == torch.float32
    with caplog.at_level(logging.WARNING):
        assert equal(Projection.from_nemo_rl(file, 3, 3), small())
    assert "3 of 6 slots hold no entry" in caplog.text


def test_nemo_rl_entries_without_id_or_weight_go_and_the_rest_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(
        {"indices": torch.tensor([[-1, 2, 1], [0, 1, 2]]), "likelihoods": torch.tensor([[0.5, 0.25, 0.5], [0.0, 3.0, 0.0]])},
        tmp_path / "w.pt",
    )
    with caplog.at_level(logging.WARNING):
        w = Projection.from_nemo_rl(tmp_path / "w.pt")
    assert w.indices.tolist() == [[2, 1, -1], [1, -1, -1]] and w.weights.tolist() == [[0.25, 0.5, 0], [3, 0, 0]]
    assert "1 of 6" in caplog.text and "2 entries of weight 0" in caplog.text


def test_nemo_rl_counts_stay_counts_also_when_stored(tmp_path: Path) -> None:
    torch.save({(0, 4): 1, (2, 1): 3.0, (2, 0): 1, (0, 3): torch.tensor(3.0)}, tmp_path / "w.pt")
    w = Projection.from_nemo_rl(tmp_path / "w.pt", 4, 5)
    assert w.indices.tolist() == [[3, 4], [-1, -1], [1, 0], [-1, -1]]
    assert w.weights.tolist() == [[3, 1], [0, 0], [3, 1], [0, 0]]
    w.save(tmp_path / "w.safetensors", "aa", "bb")
    assert equal(Projection.load(tmp_path / "w.safetensors", "aa", "bb"), w)


@pytest.mark.parametrize("case", ["p_kl", "p_kl_reverse", "gold", "h_kl"])
def test_an_imported_w_gives_the_losses_of_its_counts(case: str, tmp_path: Path) -> None:
    """The oracle's batches under W as counts, stored by NeMo-RL's ways, against the plain formulas on the very numbers."""
    (logits, *masks), teachers, spec, _ = oracle_case(Path(__file__).parent / "oracle" / f"{case}.safetensors", torch.float64)
    told, size = teachers[0].projection, teachers[0].projection.teacher_vocab_size
    counts = torch.where(told.indices >= 0, (told.weights * torch.arange(1, len(told.weights) + 1)[:, None]).float(), 0)
    torch.save({"indices": told.indices, "likelihoods": counts}, tmp_path / "dense.pt")
    pairs = {(s, t): counts[s, i].item() for s, row in enumerate(told.indices.tolist()) for i, t in enumerate(row) if t >= 0}
    torch.save(pairs, tmp_path / "counts.pt")
    expected = reference.distillation_loss(
        logits, *masks, [dataclasses.replace(teachers[0], projection=Projection(told.indices, counts, size))], spec
    )
    for name in ("dense", "counts"):
        imported = Projection.from_nemo_rl(tmp_path / f"{name}.pt", len(counts), size)
        loss = distillation_loss(logits, *masks, [dataclasses.replace(teachers[0], projection=imported)], spec).loss
        assert loss.item() == pytest.approx(float(expected.loss.detach()), rel=1e-9)


class _Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/xtoken-bomb",)


DENSE = {"indices": torch.tensor([[0, 1]]), "likelihoods": torch.tensor([[0.5, 0.5]])}
HOSTILE = {
    "bomb": {**DENSE, "extra": _Bomb()},
    "list": [1, 2],
    "empty": {},
    "names": {"a": 1},
    "triples": {(0, 1, 2): 1},
    "text counts": {(0, 1): "many"},
    "no likelihoods": {"indices": torch.tensor([[0]])},
    "other shapes": {"indices": torch.tensor([[0, 1]]), "likelihoods": torch.tensor([[1.0]])},
    "flat": {"indices": torch.tensor([0]), "likelihoods": torch.tensor([1.0])},
    "float ids": {"indices": torch.tensor([[0.0]]), "likelihoods": torch.tensor([[1.0]])},
    "id too large": {"indices": torch.tensor([[9]]), "likelihoods": torch.tensor([[1.0]])},
    "id too small": {"indices": torch.tensor([[-2]]), "likelihoods": torch.tensor([[1.0]])},
    "NaN": {"indices": torch.tensor([[0]]), "likelihoods": torch.tensor([[float("nan")]])},
    "infinite": {"indices": torch.tensor([[0]]), "likelihoods": torch.tensor([[float("inf")]])},
    "negative": {"indices": torch.tensor([[0]]), "likelihoods": torch.tensor([[-1.0]])},
    "more rows": {"indices": torch.tensor([[0], [0]]), "likelihoods": torch.tensor([[1.0], [1.0]])},
    "student id too large": {(7, 0): 1},
    "student id too small": {(-1, 0): 1},
    "teacher id too large": {(0, 7): 1},
    "NaN count": {(0, 0): float("nan")},
    "negative count": {(0, 0): -1},
    "id of 2^31": {"indices": torch.tensor([[2**31]]), "likelihoods": torch.tensor([[1.0]])},
    "id of 2^63": {(0, 2**63): 1},
    "no entries": {"indices": torch.zeros(1, 0, dtype=torch.int64), "likelihoods": torch.zeros(1, 0)},
    "whole likelihoods": {"indices": torch.tensor([[0]]), "likelihoods": torch.tensor([[1]])},
    "a table as count": {(0, 0): torch.ones(2)},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case: str, tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save(HOSTILE[case], file)
    with pytest.raises(InputError, match="w.pt: ") as caught:
        Projection.from_nemo_rl(file, 1, 2)
    assert "\n" not in str(caught.value) and not Path("/tmp/xtoken-bomb").exists()


def test_files_that_are_no_torch_files_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.pt"
    torch.save(DENSE, good)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(_Bomb()))
    (tmp_path / "text.pt").write_text("hello")
    for name in ("cut", "empty", "pickle", "text", "missing"):
        with pytest.raises(InputError, match=f"{name}.pt: cannot read"):
            Projection.from_nemo_rl(tmp_path / f"{name}.pt")
    assert not Path("/tmp/xtoken-bomb").exists()


def test_summary_counts_every_row() -> None:
    student, teacher, w = assets.table("llama3"), assets.table("qwen3"), build("llama3", "qwen3")
    summary = projection_summary(w, student, teacher)
    assert ProjectionStats.model_validate_json(summary.model_dump_json()) == summary
    assert summary.rows == 128256 == sum(summary.entries_per_row.values())
    assert summary.exact + summary.multi + summary.single_inexact + summary.empty == 128256
    assert np.sum(summary.picture) == pytest.approx(128256 - summary.empty, rel=1e-4)
    assert np.shape(summary.picture) == (48, 64)
    shown = {example.student: example.pieces for example in summary.examples}
    assert shown["201"] == [("2", 0.9009), ("0", 0.0901), ("1", 0.009)] and shown["␣the"] == [("␣the", 1.0)]


def test_block_is_the_chosen_part_of_w() -> None:
    student, teacher, w = assets.table("llama3"), assets.table("qwen3"), build("llama3", "qwen3")
    block = projection_block(w, student, teacher, [student.ids_by_bytes[t] for t in (b"201", b"100", b"\n\n")])
    assert block.rows == ["201", "100", "\\n\\n"] and block.columns == ["2", "0", "1", "\\n\\n"]
    np.testing.assert_allclose(block.weights, [[0.9009, 0.0901, 0.009, 0], [0, 0.0991, 0.9009, 0], [0, 0, 0, 1]], atol=1e-4)


def spec(projection: dict | None) -> DistillationSpec:
    names = {"student": "mistral", "teacher": "smollm2" if projection is not None else "mistral"}
    teacher = {"id": "t", "model": "m", "tokenizer": str(assets.tokenizer_folder(names["teacher"])), "projection": projection}
    return DistillationSpec.from_text(
        json.dumps(
            {
                "name": "test",
                "student": {"model": "s", "tokenizer": str(assets.tokenizer_folder(names["student"]))},
                "teachers": [teacher],
                "data": {"train": ["x"]},
                "output": {"uri": "x"},
            }
        )
    )


def test_write_projections(tmp_path: Path) -> None:
    write_projections(spec({}), tmp_path)
    prints = [assets.SOURCES[name].fingerprint for name in ("mistral", "smollm2")]
    built = Projection.load(tmp_path / "t.safetensors", *prints)
    assert equal(built, build("mistral", "smollm2"))
    stats = ProjectionStats.read(tmp_path / "t.json")
    assert stats.rows == 32000 and stats.options["top_k"] == 4 and stats.seconds > 0

    write_projection(spec({}), "t", tmp_path)
    assert equal(Projection.load(tmp_path / "projection.safetensors", *prints), built)
    with pytest.raises(InputError, match="^teacher: other: no teacher of the spec that has a projection$"):
        write_projection(spec({}), "other", tmp_path)

    for stored in (tmp_path / "t.safetensors", tmp_path / "nemo.pt"):
        if stored.suffix == ".pt":
            built.to_nemo_rl(stored)
        again = tmp_path / stored.suffix
        again.mkdir()
        write_projections(spec({"uri": str(stored)}), again)
        assert torch.allclose(Projection.load(again / "t.safetensors", *prints).weights, built.weights)


def test_write_projections_refuses(tmp_path: Path) -> None:
    small().save(tmp_path / "other.safetensors", "aa", "bb")
    with pytest.raises(InputError, match="made for a student vocabulary aa"):
        write_projections(spec({"uri": str(tmp_path / "other.safetensors")}), tmp_path)
    with pytest.raises(InputError, match="teachers: none has a projection"):
        write_projections(spec(None), tmp_path)
