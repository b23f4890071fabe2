"""Teacher processes: what they hand over, in which order they run, and that they are gone afterwards. Real processes throughout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import OPTConfig, OPTForCausalLM

from pipelines.warm import fork
from tests.support.processes import ended, forked, is_forked, left_in_shared_memory
from tests.support.tiny import tiny_model
from xtoken_core.errors import InputError
from xtoken_core.losses import HiddenLogits, TeacherBatch, TopKLogits, distillation_loss, teacher_scores
from xtoken_core.models import load_model
from xtoken_core.spec import LossSpec
from xtoken_core.teachers.pool import TeacherPool
from xtoken_core.teachers.setup import Shards, TeacherError, TeacherSetup
from xtoken_core.teachers.worker import shared_forwards

IDS = 380
"""Of the tiny model's 400 rows: the rest plays padding."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("teacher"), 400)


@pytest.fixture(autouse=True)
def nothing_left_behind(pool):
    before, teachers = set(os.listdir("/dev/shm")), set(forked(os.getpid()))
    yield
    assert not [name for name in left_in_shared_memory(before) if name.startswith("torch_")]
    assert {process for process in forked(os.getpid()) if is_forked(process)} <= teachers


def setup(folder, name="teachers.0 (one)", **changes):
    base = TeacherSetup(
        name=name,
        model=str(folder),
        num_ids=IDS,
        min_rows=IDS,
        transport="hidden",
        top_k=None,
        residency="auto",
        dtype=torch.float32,
        attention="sdpa",
        device=torch.device("cpu"),
        threads=1,
    )
    return replace(base, **changes)


def micro_batches(*shapes, seed=0):
    generator = np.random.default_rng(seed)
    return [{"input_ids": generator.integers(0, IDS, shape)} for shape in shapes]


def own_logits(folder, batch):
    with torch.no_grad():
        return load_model(str(folder))(torch.from_numpy(batch["input_ids"])).logits[..., :IDS]


def dense(logits):
    if isinstance(logits, TopKLogits):
        return torch.zeros(logits.shape, device=logits.values.device).scatter_(-1, logits.indices.long(), logits.values)
    return logits.dense() if isinstance(logits, HiddenLogits) else logits


@pytest.fixture(scope="module")
def pool(folder):
    """Three teachers of one model, each with another transport; the second stays where it is."""
    score = LossSpec(mode="p_kl", weight_metric="ce")
    setups = [
        setup(folder, "hidden", residency="offload"),
        setup(folder, "logits", transport="logits"),
        setup(folder, "topk", transport="topk", top_k=IDS, residency="offload", scores=score),
    ]
    with TeacherPool(setups) as pool:
        yield pool


def scored(batches):
    """The same micro-batches with what a score is made of; the second half of every row is masked."""
    result = []
    for batch in batches:
        mask = np.ones(batch["input_ids"].shape, dtype=np.int64)
        mask[:, mask.shape[1] // 2 :] = 0
        names = {"input_ids": batch["input_ids"], "token_mask": mask, "token_bytes": mask.astype(np.int32)}
        result.append(batch | {f"scored_{k}": v for k, v in names.items()} | {"sample_mask": np.ones(len(mask), np.float32)})
    return result


def hold(teacher):
    """What a student does that is to be killed."""
    with TeacherPool([teacher]) as pool:
        pool.run([micro_batches((1, 4))])
        print("heard", flush=True)
        time.sleep(600)


def run(pool, batches):
    return pool.run([batches, batches, scored(batches)])


def test_every_transport_hands_over_the_models_logits_and_gives_the_same_loss(folder, pool):
    batches = micro_batches((2, 9), (1, 14))
    losses = []
    for heard in run(pool, batches):
        for batch, logits in zip(batches, heard.logits):
            torch.testing.assert_close(dense(logits), own_logits(folder, batch))
        ids = torch.from_numpy(batches[0]["input_ids"])
        student = torch.randn(2, 9, IDS, generator=torch.Generator().manual_seed(0))
        ones, spec = torch.ones_like(ids), LossSpec(mode="p_kl", vocab_topk=50)
        losses.append(distillation_loss(student, ids, ones, torch.ones(2), [TeacherBatch(heard.logits[0])], spec).loss.item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), max_size=12), st.integers(1, 200))
def test_forwards_take_what_has_room_in_order(shapes, room):
    groups = list(shared_forwards(shapes, room))
    assert [n for group in groups for n in range(group.start, group.stop)] == list(range(len(shapes)))

    def tokens(first, last):
        return sum(rows for rows, _ in shapes[first:last]) * max(length for _, length in shapes[first:last])

    for group in groups:
        assert group.stop - group.start == 1 or tokens(group.start, group.stop) <= room
        assert group.stop == len(shapes) or tokens(group.start, group.stop + 1) > room


def test_packed_micro_batches_that_share_a_forward_keep_their_documents_apart(folder):
    """Rows of several documents, of different lengths: as if each micro-batch had run alone."""
    generator = np.random.default_rng(0)

    def packed(*documents):
        positions = np.concatenate([np.arange(n) for n in documents])[None]
        return {"input_ids": generator.integers(0, IDS, positions.shape), "position_ids": positions}

    batches = [packed(5, 4), packed(3, 6, 7), packed(2)]
    with TeacherPool([setup(folder, packed=True)]) as pool:
        together = [dense(logits).clone() for logits in pool.run([batches])[0].logits]
        alone = [dense(pool.run([[batch]])[0].logits[0]).clone() for batch in batches]
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_teacher_that_waits_for_another_ranks_ends_with_its_student(folder, tmp_path):
    """It stands in a rendezvous (or a collective) that never ends and cannot read its pipe."""
    known = set(forked(os.getpid()))
    student, _ = fork(hold, setup(folder, shards=Shards(f"file://{tmp_path}/group", 1, 2)))
    while not (tmp_path / "group").exists():  # which the first thing that it does there makes
        assert student.is_alive()
        time.sleep(0.05)
    [teacher] = [process for process in forked(os.getpid()) if process not in known and process.pid != student.pid]
    student.kill()
    student.join()
    assert ended([teacher])


def test_buffers_are_shared_anew_only_when_they_grow(folder, pool):
    sizes, addresses, heads = [], [], []
    for shape in ((2, 30), (1, 5), (2, 29), (3, 50), (2, 9)):
        batch = micro_batches(shape)[0]
        logits = run(pool, [batch])[0].logits[0]
        torch.testing.assert_close(logits.dense(), own_logits(folder, batch))
        sizes.append(pool.teachers[0].shared_bytes)
        addresses.append(logits.hidden.data_ptr())
        heads.append(logits.weight.data_ptr())
    assert sizes[0] == sizes[1] == sizes[2] < sizes[3] == sizes[4]
    assert addresses[0] == addresses[1] == addresses[2]
    assert addresses[3] == addresses[4]
    assert len(set(heads)) == 1  # the lm_head is shared once
    assert logits.weight.shape == (IDS, 32)


def test_scores_are_those_of_the_teachers_own_logits(folder, pool):
    batch = scored(micro_batches((2, 9)))[0]
    given = run(pool, micro_batches((2, 9)))
    ids, mask = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["scored_token_mask"])
    expected = teacher_scores(own_logits(folder, batch), ids, mask, torch.ones(2), pool.teachers[2].setup.scores)
    assert given[2].scores[0] == pytest.approx(expected.tolist(), rel=1e-5)
    assert given[0].scores == []


def test_one_teacher_has_left_before_the_next_is_brought_in(pool):
    for _ in range(2):
        run(pool, micro_batches((2, 9)))
        order = [(event.teacher, event.what) for event in pool.events]
        visits = [("hidden", "onload"), ("hidden", "run"), ("hidden", "offload")]
        assert order == [*visits, ("logits", "run"), *(("topk", what) for _, what in visits)]
        assert all(a.started <= a.ended <= b.started for a, b in zip(pool.events, pool.events[1:]))


def test_outputs_are_released_once_per_run(pool):
    run(pool, micro_batches((1, 4)))
    before = [t.releases for t in pool.teachers]
    for _ in range(3):
        run(pool, micro_batches((1, 4)))  # gives back the run before
    assert [t.releases for t in pool.teachers] == [n + 3 for n in before]
    pool.release()
    pool.release()
    assert [t.releases for t in pool.teachers] == [n + 4 for n in before]


@pytest.mark.parametrize("count", [1, 2])
def test_outputs_are_released_once_when_the_students_step_raises(folder, count):
    pool = TeacherPool([setup(folder, f"t{i}") for i in range(count)])
    with pytest.raises(ZeroDivisionError), pool:
        pool.run([micro_batches((1, 4))] * count)
        raise ZeroDivisionError
    pool.close()
    assert [t.releases for t in pool.teachers] == [1] * count


def test_a_killed_teacher_ends_the_run(folder):
    pool = TeacherPool([setup(folder, "teachers.0 (one)"), setup(folder, "teachers.1 (two)")])
    last_words = r"^teachers\.1 \(two\): its process died \(SIGKILL, perhaps out of memory\)$"
    with pytest.raises(TeacherError, match=last_words), pool:
        pool.run([micro_batches((1, 4))] * 2)
        pool.check()
        os.kill(pool.teachers[1]._process.pid, signal.SIGKILL)
        with pytest.raises(TeacherError, match=last_words):  # while the student works
            while True:
                pool.check()
        pool.run([micro_batches((1, 4))] * 2)  # and when it wants something of the teacher
    assert [t.releases for t in pool.teachers] == [2, 1]


def test_a_teacher_that_fails_says_why(folder):
    with pytest.raises(TeacherError, match=r"^teachers\.0 \(one\): IndexError: "), TeacherPool([setup(folder)]) as pool:
        pool.run([[{"input_ids": np.full((1, 4), 10**6)}]])


def test_a_missing_model_is_bad_input_and_ends_the_others_too(folder, tmp_path):
    missing = setup(tmp_path / "none", "teachers.1 (gone)")
    with pytest.raises(InputError, match=r"^teachers\.1 \(gone\): .*none: cannot load the model: no such file"):
        TeacherPool([setup(folder), missing]).__enter__()


def test_a_model_that_does_not_fit_is_named_once(folder, tmp_path):
    with pytest.raises(InputError, match=rf"^teachers\.0 \(one\): {folder}: its lm_head has 400 rows, fewer than the 401 ids"):
        TeacherPool([setup(folder, num_ids=401, min_rows=401)]).__enter__()
    shape = {"vocab_size": 60, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=32)).save_pretrained(tmp_path)
    mixing = setup(tmp_path, num_ids=60, min_rows=60, transport="logits", packed=True)
    with pytest.raises(InputError, match=rf"^teachers\.0 \(one\): {tmp_path}: data\.packing: OPTForCausalLM"):
        TeacherPool([mixing]).__enter__()


INTERRUPTED = """
import signal, sys, time
import numpy as np
from tests.teachers.test_teachers import setup, micro_batches
from xtoken_core.teachers.pool import TeacherPool

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests were started in the background
    with TeacherPool([setup(sys.argv[1], "t0")]) as pool:
        pool.run([micro_batches((1, 4))])
        print(*(t._process.pid for t in pool.teachers), flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
def test_teachers_are_gone_after_an_interrupt(folder, tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    student = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    [pid] = student.stdout.readline().split()
    [teacher] = forked(student.pid)
    assert teacher.pid == int(pid)
    os.killpg(student.pid, signal.SIGINT)  # as a terminal does: teachers get it too
    student.wait(300)
    assert ended([teacher]), "a teacher outlived its student"


def test_teachers_are_gone_after_the_students_death(folder):
    known = set(forked(os.getpid()))
    student, output = fork(hold, setup(folder))
    with output:
        assert output.readline() == "heard\n"
        [teacher] = [process for process in forked(os.getpid()) if process not in known and process.pid != student.pid]
        student.kill()
        student.join()
        assert ended([teacher]), "a teacher outlived its student"
