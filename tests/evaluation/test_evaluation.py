"""Bits per byte, intervals, agreement and benchmarks, on random models with real tokenizers."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.support.tiny import texts, tiny_model, tiny_run
from xtoken_core.data.documents import Document
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.errors import InputError
from xtoken_core.evaluation.bits_per_byte import opener_of, token_nats, windows
from xtoken_core.evaluation.evaluate import bits_interval, evaluate, held_out, load_for
from xtoken_core.evaluation.samples import samples
from xtoken_core.results.evaluation import Evaluation
from xtoken_core.results.subject import BEFORE, LAST, teacher_subject
from xtoken_core.spec import DistillationSpec, EvaluationSpec
from xtoken_core.tokenization import encode, load_tokenizer
from xtoken_core.training.distill import distill
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.workflow.evaluations import evaluate_group, read_evaluations
from xtoken_core.workflow.subjects import Group
from xtoken_core.workflow.vocabularies import matrices, write_projections


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run's folder and spec (a dict)."""
    folder = tmp_path_factory.mktemp("run")
    spec = tiny_run(folder)
    (folder / "tale.jsonl").write_text("".join(json.dumps({"text": t[:700]}) + "\n" for t in texts(9)[4:]))
    spec["evaluation"] = {"texts": [str(folder / "held-out.jsonl"), str(folder / "tale.jsonl")], "window": 48}
    return folder, spec


def parsed(spec: dict, **sections) -> DistillationSpec:
    return DistillationSpec.from_text(json.dumps({**spec, **sections}))


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(str(folder))


@given(st.lists(st.integers(0, 100), max_size=5), st.integers(1, 20), st.data())
def test_windows_score_every_token_once_in_enough_context(lengths, window, data):
    stride = data.draw(st.integers(1, window))
    scored = [[] for _ in lengths]
    for w in windows(lengths, window, stride):
        assert 0 <= w.start <= w.scored < w.end <= lengths[w.text] and w.end - w.start <= window
        assert w.start == 0 or w.scored - w.start >= window - stride
        scored[w.text] += range(w.scored, w.end)
    assert scored == [list(range(length)) for length in lengths]


@torch.no_grad()
@pytest.mark.parametrize("bos", [True, False])
def test_token_nats_are_the_models_own(run, bos):
    model, tok = loaded(run[0] / "student")
    opener = tok.bos_token_id if bos else tok.eos_token_id
    ids = [np.array(i) for i in encode(tok, [texts(3)[2][:300], texts(2)[1][:40]])]

    def direct(context, tokens):
        row = torch.tensor([[*context, *tokens]])
        return -model(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0].double().numpy()

    whole = token_nats(model, ids, opener, opener if bos else None, window=500, stride=250)
    for nats, tokens in zip(whole, ids):
        np.testing.assert_allclose(nats, direct([opener], tokens), rtol=1e-4)

    cut = token_nats(model, ids, opener, opener if bos else None, window=20, stride=8, batch_tokens=100)
    np.testing.assert_allclose(cut[0][:20], direct([opener], ids[0][:20]), rtol=1e-4)
    before = [opener] if bos else [ids[0][7]]  # the second window reads tokens 8 to 27 and scores the last 8
    np.testing.assert_allclose(cut[0][20:28], direct(before, ids[0][8:28])[-8:], rtol=1e-4)


def test_a_uniform_model_costs_the_same_per_token_with_any_window(run):
    model, tok = loaded(run[0] / "student")
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    ids = [np.array(tokens, np.int64) for tokens in encode(tok, [*texts(3), "naïve 日本"])]
    for window in (16, 1000):
        for nats, tokens in zip(token_nats(model, ids, opener_of(tok), tok.bos_token_id, window, window // 2), ids):
            np.testing.assert_allclose(nats, [math.log(len(tok))] * len(tokens), rtol=1e-5)
    [nats] = token_nats(model, [np.array([1, 2, 3])], None, None, 16, 8)
    np.testing.assert_allclose(nats, [math.log(len(tok))] * 3, rtol=1e-5)


def test_the_opener_is_bos_then_eos(run):
    _, tok = loaded(run[0] / "student")
    assert opener_of(tok) == tok.bos_token_id
    tok.bos_token = "<eos>"  # one that its rows do not begin with
    tok.eos_token = "<bos>"
    assert opener_of(tok) == tok.eos_token_id != tok.bos_token_id


def test_intervals_hold_the_total_and_shrink_with_documents():
    random = np.random.default_rng(1)
    widths = []
    for count in (10, 1000):
        sizes = random.integers(100, 5000, count)
        found = bits_interval(sizes * random.normal(1.0, 0.2, count), sizes)
        assert found["low"] < found["total"] < found["high"]
        widths.append(found["high"] - found["low"])
    assert widths[1] < widths[0] / 4
    assert bits_interval(np.array([8.0]), np.array([4])) == {"total": 2.0, "low": None, "high": None}


def test_evaluate_a_student(run, tmp_path):
    folder, spec = run
    spec = parsed(spec)
    prepare_rows(spec, tmp_path / "rows" / "validation", "validation")
    write_projections(spec, tmp_path / "w")
    became = folder / "same"  # as if the student had become its teacher
    out = evaluate(spec, LAST, became, tmp_path / "rows", matrices(spec, tmp_path / "w"), {"other": "p_kl"})
    out.write(tmp_path / "result.json")
    assert Evaluation.read(tmp_path / "result.json") == out
    bits = out.bits_per_byte
    assert bits.per_corpus.keys() == {"held-out", "tale"} and bits.per_corpus["tale"].documents == 5
    assert bits.total == pytest.approx(sum(bits.documents.bits) / sum(bits.documents.bytes))
    assert out.agreement["same"].top1 == 1.0 and abs(out.agreement["same"].kl) < 1e-6
    # random models with tied embeddings say the last token again, and most chunks are one token on both sides
    assert out.agreement["other"].chunks > 50 and 0.5 < out.agreement["other"].top1 < 1
    assert out.agreement["other"].kl > 0
    assert len(out.samples) == 3 and all(s.prompt and s.reference for s in out.samples)


def test_groups_are_measured_into_one_folder(run, tmp_path):
    _, spec = run
    evaluate_group(parsed(spec), Group.TEACHERS, tmp_path)
    evaluate_group(parsed(spec), Group.BEFORE, tmp_path)
    whole, *teachers = read_evaluations(tmp_path)
    assert [r.subject for r in (whole, *teachers)] == [BEFORE, *map(teacher_subject, ("other", "same"))]
    pruned = parsed(spec, student={**spec["student"], "keep_layers": 1})
    assert len(teachers[0].samples) == 3 and not whole.agreement
    assert evaluate(pruned, BEFORE).bits_per_byte.total != whole.bits_per_byte.total
    assert teachers[0].bits_per_byte.documents.bytes == whole.bits_per_byte.documents.bytes
    with pytest.raises(InputError, match="group: pupils: not one of teachers, student-before"):
        Group.named("pupils")


def test_a_last_checkpoint_that_is_the_best_is_measured_once(run, tmp_path, capsys):
    folder, spec = run
    for state in ("best", "last"):
        shutil.copytree(folder / "same", tmp_path / "run" / state)
    best, last = evaluate_group(parsed(spec), Group.AFTER, tmp_path / "once", tmp_path / "run")
    assert capsys.readouterr().out.splitlines() == ["evaluating student_after_best", "student_after_last is student_after_best"]
    assert (last.subject, last.model) == (LAST, f"{tmp_path}/run/last") and last.bits_per_byte == best.bits_per_byte
    assert read_evaluations(tmp_path / "once") == [best, last]

    shutil.copy(folder / "student" / "model.safetensors", tmp_path / "run" / "last")
    best, last = evaluate_group(parsed(spec), Group.AFTER, tmp_path / "twice", tmp_path / "run")
    assert last.bits_per_byte.total != best.bits_per_byte.total


@pytest.mark.parametrize("stateful", [False, True])
def test_samples_are_what_each_prompt_alone_gives(run, stateful):
    model, tok = loaded(run[0] / "other")
    model._is_stateful = stateful
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.randn(model.get_output_embeddings().weight.shape))
    documents = [Document(i, "tale", f"tale:{i}", text) for i, text in enumerate(texts(3))]
    together = samples(model, tok, documents)
    assert len({len(tok(sample.prompt)["input_ids"]) for sample in together}) > 1  # so that some are padded
    assert len({sample.text for sample in together}) == 3
    assert together == [sample for document in documents for sample in samples(model, tok, [document])]


@pytest.mark.parametrize(
    "rows", [{"student": 400, "same": 404, "third": 402}, {"student": 404, "same": 400, "third": 402}], ids=["fewer", "more"]
)
def test_models_of_one_vocabulary_meet_on_the_ids_that_all_have_rows_for(tmp_path, rows):
    """As with Gemma 3: 262145 ids, of which the last stands for no text and has no row in some models."""
    spec = tiny_run(tmp_path)
    tiny_model(tmp_path / "third", 400, 3)
    for name, count in rows.items():
        model, tok = loaded(tmp_path / name)
        model.resize_token_embeddings(count)
        tok.add_tokens(["<image>"], special_tokens=True)
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    same = [{"id": name, "model": str(tmp_path / name)} for name in ("same", "third")]
    spec = parsed(spec, teachers=[same[0] | {"transport": "topk", "top_k": 8}, same[1]], evaluation={"bits_per_byte": False})
    for split in ("train", "validation"):
        prepare_rows(spec, tmp_path / "rows" / split, split)
    assert distill(spec, TrainingInputs((tmp_path / "rows",)), tmp_path / "out").steps == 2
    out = evaluate(spec, LAST, tmp_path / "out" / "last", tmp_path / "rows")
    assert all(found.kl > 0 for found in out.agreement.values())


def test_without_text_of_its_own_validation_is_measured_and_without_any_nothing(run, tmp_path):
    folder, spec = run
    assert len(held_out(parsed(spec, evaluation={}))) == 1  # data.validation
    none = parsed(spec, evaluation={}, data={"train": spec["data"]["train"]})
    assert evaluate(none, BEFORE).bits_per_byte is None
    (folder / "blank.txt").write_text("")
    with pytest.raises(InputError, match="evaluation.texts: no text"):
        held_out(parsed(spec, evaluation={"texts": [str(folder / "blank.txt")]}))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_models_are_measured_with_the_attention_they_are_trained_with(run, attention):
    _, spec = run
    loaded, _ = load_for(parsed(spec, training={"attention": attention}), teacher_subject("other"), None)
    assert loaded.model.config._attn_implementation == attention


def test_bits_of_chats_are_those_of_the_answers(tmp_path):
    model = tiny_model(tmp_path / "model", 400)
    tok = load_tokenizer(str(model))
    tok.chat_template = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    tok.save_pretrained(model)
    chats = [[{"role": "user", "content": "Say it."}, {"role": "assistant", "content": t[:200].strip()}] for t in texts(3)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
    spec = {
        "name": "chat",
        "student": {"model": str(model)},
        "teachers": [{"id": "t", "model": str(model)}],
        "data": {"train": ["unused"], "validation": [str(tmp_path / "chats.jsonl")], "format": "messages", "max_length": 200},
        "output": {"uri": "unused"},
    }
    out = evaluate(parsed(spec), BEFORE)
    assert out.bits_per_byte.documents.bytes == [len(c[1]["content"].encode()) for c in chats]
    assert 2 < out.bits_per_byte.total < 9  # a random model's guess among 400 tokens
    assert out.samples[0].prompt.endswith("Say it.<eos>")


@pytest.mark.slow
def test_tasks_offline_and_from_a_folder(run, tmp_path):
    pytest.importorskip("lm_eval")
    from xtoken_core.evaluation.harness import SUITES, plan_tasks, run_tasks

    model, tok = loaded(run[0] / "student")
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: own.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    lines = [{"q": f"{n} and", "choices": [" one", " two"], "answer": n % 2} for n in range(8)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = run_tasks(EvaluationSpec(tasks=("xtoken-offline", str(tmp_path)), limit=4), model, tok, None)
    assert results.keys() == {*SUITES["xtoken-offline"].names, "own"}
    own = results["own"]
    assert own.metric == "acc,none" and own.samples == 4 and own.low <= own.value <= own.high
    assert results["xtoken_gsm_symbolic"].shots == 3

    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no task .* in it"):
        plan_tasks([str(tmp_path / "none")])
    [paper] = plan_tasks(["xtoken-paper"])
    assert paper.shots == 3 and "gsm8k" in paper.names


def test_tasks_without_the_harness_are_one_line(run, monkeypatch):
    from xtoken_core.evaluation import harness as benchmarks

    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"evaluation.tasks: need lm-evaluation-harness: pip install"):
        benchmarks.run_tasks(EvaluationSpec(tasks=("gsm8k",)), *loaded(run[0] / "student"), None)
