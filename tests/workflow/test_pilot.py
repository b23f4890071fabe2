"""The pilot without any training: its rungs, who is tried where, and what is said of simulated runs."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.pilot import main as benchmark
from xtoken_core.errors import InputError, RunError
from xtoken_core.report.pilot import pilot_section
from xtoken_core.report.verdict import pilot_verdict
from xtoken_core.results.evaluation import BitsPerByte, CorpusBits, Documents, Evaluation
from xtoken_core.results.pilot import Blocks, Pilot, Trial
from xtoken_core.results.subject import BEFORE, teacher_subject
from xtoken_core.spec import DistillationSpec, PilotSpec
from xtoken_core.workflow.pilot import MAX_BLOCKS, blocks
from xtoken_core.workflow.pilot_verdict import audit, judge
from xtoken_core.workflow.rungs import Place, candidate_of, chosen_candidate, rungs, standing, trial_spec

CANDIDATES = [{"name": "both"}, {"name": "big-only", "teachers": ["big"], "set": ["loss.mode=p_kl"]}, {"name": "gentle", "set": ["training.learning_rate=1e-6"]}]  # fmt: skip


def spec_of(*overrides, **sections):
    base = {
        "name": "run",
        "student": {"model": "small"},
        "teachers": [{"id": "big", "model": "big", "projection": {}}, {"id": "same", "model": "same"}],
        "data": {"train": ["train.txt"], "validation": ["held-out.txt"]},
        "training": {"max_steps": 1000, "global_batch_size": 8, "warmup_steps": 100},
        "output": {"uri": "out"},
        "pilot": {"candidates": CANDIDATES},
    }
    return DistillationSpec.from_text(json.dumps(base | sections), overrides)


@given(st.integers(1, 16), st.floats(0.01, 1))
def test_rungs_take_the_budget_and_end_with_one_candidate(count, budget):
    found = rungs(PilotSpec(candidates=[{"name": f"c{n}"} for n in range(count)], budget=budget))
    assert sum((rung.candidates + 1) * rung.share for rung in found) == pytest.approx(budget)
    assert found[0].candidates == count and found[-1].candidates == 1 and len(found) >= 2
    for before, after in zip(found, found[1:]):
        assert after.share == pytest.approx(2 * before.share) and after.candidates == -(-before.candidates // 2)


def test_a_short_run_is_the_candidates_main_run_in_small():
    spec = spec_of("training.eval_steps=10", "training.save_steps=7")
    tried = trial_spec(spec, spec.pilot.candidates[1], 0.05, rows=10**6)
    assert [teacher.id for teacher in tried.teachers] == ["big"] and tried.loss.mode == "p_kl"
    assert (tried.training.max_steps, tried.training.warmup_steps, tried.training.save_steps) == (50, 5, 7)
    assert tried.data.validation == () and tried.evaluation.texts == ("held-out.txt",) and tried.pilot is None
    epochs = spec_of(training={"epochs": 2, "global_batch_size": 8})
    assert trial_spec(epochs, candidate_of({"name": "ce"}), 0.1, rows=800).training.max_steps == 20
    with pytest.raises(InputError, match="^pilot.budget: leaves 1 of 1000 steps to the shortest runs, at least 2 are needed$"):
        trial_spec(spec, spec.pilot.candidates[0], 0.0015, rows=10**6)


def test_places_go_to_those_who_came_through():
    assert Place.of(CANDIDATES[1:2], [], 0, 1, "0.1").candidate == spec_of().pilot.candidates[1]
    second = Place.of(CANDIDATES, ["gentle", "both"], 1, 2, "0.2")
    assert (second.candidate.name, second.share) == ("both", 0.2)
    assert Place.of(CANDIDATES, [], 0, 2, "0.2").candidate is None
    assert Place.of([{"name": "ce"}], [], 0, 3, "0.2").candidate.name == "ce"


def test_a_rung_is_ranked_and_failures_go():
    trials = [
        trial("both", 1, 0.9),
        trial("ce", 1, 0.5),
        trial("gentle", 1, 0.8),
        Trial(candidate="x", rung=1, failed="loss: nan"),
    ]
    assert standing(trials) == ["gentle", "both"]


def test_a_trial_travels_as_a_parameter():
    """KFP's local runner puts strings into lists as they are, quotes and all."""
    told = trial("both", 1, 0.9).model_copy(update={"failed": 'loss: "nan" \\ 100 %'})
    assert '"' not in told.to_parameter() and "\\" not in told.to_parameter()
    assert Trial.from_parameter(told.to_parameter()) == told


def trial(candidate, rung, bits, seconds=1.0, noise=0.0):
    """A trial over 20 blocks that are unequally hard; `noise`: of this run on each."""
    hard = np.linspace(0.8, 1.2, 20)
    wiggle = np.random.default_rng(len(candidate) + 10 * rung).normal(0, noise, 20) if noise else 0
    return Trial(
        candidate=candidate,
        rung=rung,
        steps=25 * 2**rung,
        seconds_per_step=seconds,
        bits_per_byte=bits,
        per_corpus={"code": bits, "prose": bits + 0.5},
        blocks=Blocks(bits=(1000 * (bits * hard + wiggle)).tolist(), bytes=[1000] * 20),
    )


def pilot_of(gains, seconds=1.5, rows=10**6, noise=0.001):
    """The verdict on runs that are ahead of cross-entropy by `gains`, candidate by candidate and rung by rung."""
    reference = [trial("ce", rung, 1 - 0.02 * rung) for rung in (1, 2, 3)]
    others = [
        trial(name, rung, 1 - 0.02 * rung - gain, seconds, noise)
        for name, own in gains.items()
        for rung, gain in enumerate(own, 1)
    ]
    return judge(spec_of(), [*reference, *others], rows, ["Teacher same is no better."])


def test_a_gain_that_is_there_on_every_rung_is_worth_the_main_run():
    found = pilot_of({"both": [0.01], "big-only": [0.03, 0.03, 0.03], "gentle": [0.02, 0.021]})
    assert found.chosen == "big-only" and [o.candidate for o in found.outlooks] == ["big-only", "gentle", "both"]
    best = found.outlooks[0]
    assert best.expected.steps == 1000 and best.expected.value == pytest.approx(0.03, abs=0.002) and best.expected.low > 0
    assert best.cost == 1.5 and best.same_time.value < best.expected.value - 0.005
    assert best.course[0].steps == 200 and best.course[-1].steps == 1000
    told = pilot_verdict(found)
    assert told.tone == "good" and told.headline.startswith("Distil as big-only: +0.0")
    assert told.sentences[0].startswith("Next: the same command with --set pilot.then=best; the main run follows as big-only")
    assert "In the same GPU time cross-entropy takes 1.5 times the steps; against that big-only is not told apart: +0.0" in str(
        told
    )
    assert (
        told.sentences[-1].startswith("It rests on 9 short runs of 50, 100, 200 steps") and "came to 0.940." in told.sentences[-1]
    )
    assert "big-only: teachers big, loss.mode=p_kl." in told.sentences and "Teacher same is no better." in told.sentences
    assert json.loads(chosen_candidate(spec_of(), found.chosen)) == CANDIDATES[1]
    assert Pilot.parse(found.model_dump_json(), "x") == found
    where = pilot_section(found).by_text
    assert where.columns == ["candidate", "code", "prose"]
    assert [cell.text for cell in where.rows[0]] == ["big-only, 200 steps", "+0.0300", "+0.0300"]


@pytest.mark.parametrize(
    ("gains", "options", "words", "now"),
    [
        (
            [-0.01, -0.012, -0.013],
            {},
            "Do not distil: no candidate is expected to be ahead; the best, big-only, -0.01",
            "train on cross-entropy only, as --set pilot.then=best does, or try other candidates",
        ),
        ([0.001, -0.002, 0.001], {"noise": 0.01}, "which is not told apart from nothing", "a larger pilot.budget"),
        (
            [0.03, 0.03, 0.03],
            {"seconds": 30.0},
            "each takes 30.0 times as long. Cross-entropy given that time is expected ahead, by +",
            "train on cross-entropy only for 30,000 steps",
        ),
    ],
)
def test_better_not_to_distil(gains, options, words, now):
    found = pilot_of({"big-only": gains, "both": gains[:1], "gentle": gains[:1]}, **options)
    assert found.chosen == "ce" and words in found.reason and found.next.startswith(now)
    assert json.loads(chosen_candidate(spec_of(), "ce")) == {"name": "ce"}
    assert "Do not distil" in pilot_section(found).verdict.headline


def test_cross_entropy_cannot_go_on_where_the_text_does_not_last():
    gains = {"big-only": [0.03, 0.03, 0.03], "both": [0.0], "gentle": [0.0]}
    assert pilot_of(gains, seconds=30.0, rows=8 * 1000 * 2).chosen == "big-only"
    assert "the text does not last" in pilot_verdict(pilot_of(gains, seconds=30.0, rows=8)).sentences[2]


def test_failures_are_told_and_without_a_reference_there_is_no_verdict():
    failed = [Trial(candidate=name, rung=1, failed="step 3: loss is not finite") for name in ("both", "big-only", "gentle")]
    reference = [trial("ce", rung, 1.0) for rung in (1, 2, 3)]
    found = judge(spec_of(), [*reference, *failed, Trial(candidate="", rung=2)], 100)
    assert found.chosen == "ce" and "no candidate has an outcome (both: step 3: loss is not finite)" in found.reason
    assert pilot_section(found).expected is None and len(found.trials) == 6
    with pytest.raises(RunError, match="cross-entropy only has no outcome to compare with: nan"):
        judge(spec_of(), [Trial(candidate="ce", rung=1, failed="nan")], 100)


def evaluation(subject, **corpora):
    measured = {name: CorpusBits(total=bits, documents=2, bytes=100) for name, bits in corpora.items()}
    return Evaluation(
        subject=subject, bits_per_byte=BitsPerByte(per_corpus=measured, documents=Documents(bits=[1, 2], bytes=[3, 4]))
    )


def test_a_teacher_that_is_no_better_is_named_with_the_text():
    before = [evaluation(BEFORE, code=1.0, prose=1.2)]
    teachers = [evaluation(teacher_subject("big"), code=0.8, prose=1.1), evaluation(teacher_subject("same"), code=1.0, prose=0.9)]
    assert audit(before, teachers) == [
        "Teacher same is no better than the student in bits per byte of code (1.000 against 1.000)."
    ]
    alone = Evaluation(subject=BEFORE, bits_per_byte=BitsPerByte(documents=Documents(bits=[1], bytes=[2])))
    with pytest.raises(InputError, match="needs two held-out documents or more"):
        audit([alone], teachers)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 1000)), min_size=1, max_size=300))
def test_blocks_hold_all_documents(documents):
    bits, sizes = [list(column) for column in zip(*documents)]
    found = blocks(Documents(bits=bits, bytes=sizes))
    assert len(found.bits) == len(found.bytes) == min(MAX_BLOCKS, len(bits))
    assert sum(found.bits) == pytest.approx(sum(bits)) and sum(found.bytes) == sum(sizes)


@pytest.mark.parametrize(
    ("pilot", "line"),
    [
        ({"candidates": []}, "pilot.candidates: should have at least 1 item"),
        (
            {"candidates": [{"name": "ce"}]},
            "pilot.candidates.0.name: ce is the candidate without teachers, which is always there",
        ),
        ({"candidates": [{"name": "a"}, {"name": "a"}]}, "pilot.candidates.1 (a): name: used by an earlier candidate"),
        ({"candidates": [{"name": "a", "teachers": ["none"]}]}, "pilot.candidates.0: a: teachers: none: not one of big, same"),
        (
            {"candidates": [{"name": "a", "set": ["data.max_length=9"]}]},
            "pilot.candidates.0.set: data.max_length: a candidate changes loss",
        ),
        ({"candidates": [{"name": "a", "set": ["loss.mode=kl"]}]}, "pilot.candidates.0: a: loss.mode: not one of"),
        (
            {"candidates": [{"name": "a", "set": ["loss.kd_weight=2"]}]},
            "pilot.candidates.0: a: loss.kd_weight: not used with dynamic",
        ),
        ({"candidates": [{"name": "a"}], "budget": 0}, "pilot.budget: should be greater than 0"),
        ({"candidates": [{"name": "a"}], "then": "go"}, "pilot.then: not one of stop, best"),
    ],
)
def test_nonsense_is_refused_by_name(pilot, line):
    with pytest.raises(InputError) as caught:
        spec_of(pilot=pilot)
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["evaluation.bits_per_byte=false"], "pilot.candidates: need bits per byte"),
        (["output.registry={server: http://registry}"], "pilot.then: stop leaves no student for output.registry"),
        (
            ["teachers.same.scores={}", "pilot.candidates.0.set=[loss.temperature=2]"],
            "pilot.candidates.0: both: loss.temperature: the scores, which all share, are made at one",
        ),
    ],
)
def test_a_run_that_a_pilot_does_not_fit_is_refused(overrides, line):
    with pytest.raises(InputError) as caught:
        spec_of(*overrides)
    assert line in str(caught.value)


def test_the_benchmark_foretells_long_runs_from_short_ones_and_each_setting_by_the_others(tmp_path, capsys):
    """Two seeds of an arm whose gain turns from one length to the next, in six settings, by more in the last; a run without a twin of its length."""
    turns = {f"s{n}": 0.004 for n in range(5)} | {"wild": 0.05}

    def line(setting, arm, seed, steps, bits):
        job = {"setting": setting, "arm": {"name": arm, "loss": None if arm == "ce" else {}}, "seed": seed, "steps": steps}
        return json.dumps({"key": "k", "job": job, "held_out": {"code": bits}})

    lines = [
        line(s, arm, seed, steps, 0.8 - 0.01 * np.log2(steps) - (arm != "ce") * (0.01 + turn * (steps == 400) + seed * 0.0004))
        for s, turn in turns.items()
        for arm in ("ce", "kl")
        for seed in (0, 1)
        for steps in (100, 200, 400)
    ]
    (tmp_path / "lab.jsonl").write_text("\n".join([*lines, line("s0", "kl", 0, 800, 0.6), json.dumps({"summary": 1})]))
    benchmark([tmp_path / "lab.jsonl"])
    *told, summary = map(json.loads, capsys.readouterr().out.splitlines())
    cases, folds = told[:12], told[12:]
    assert [(case["seed"], case["short"], case["long"]) for case in cases[:2]] == [(0, [100, 200], 400), (1, [100, 200], 400)]
    assert all(case["expected"] == pytest.approx(0.01, abs=0.0005) for case in cases)
    assert (summary["cases"], summary["settings"], summary["held"], summary["sign_right"]) == (12, 6, 10, 12)
    wild = folds[-1]
    assert wild["left_out"] == ["wild", "code"] and wild["plain"]["held"] == wild["conformal"]["held"] == 0  # the others are tame
    assert folds[0]["conformal"]["factor"] == summary["conformal_factor"] > 5  # nine of ten of them, the wild one included
    assert summary["left_out_held"]["conformal"] == 10
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:12]))
    benchmark([tmp_path / "few.jsonl"])
    few = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (few["cases"], few["conformal_factor"], few["left_out_held"]["fitted"]) == (2, None, None)
