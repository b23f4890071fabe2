"""A teacher too large for one GPU: its weights spread over its processes on all ranks, each rank with its own samples."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import torch

from tests.tiny import tiny_model
from tests.unit.test_teachers import dense, micro_batches, own_logits, setup
from xtoken_core.models import load_model, weight_bytes
from xtoken_core.teachers.process import Shards
from xtoken_core.teachers.schedule import TeacherPool


def test_every_rank_gets_the_whole_models_logits_of_its_own_samples(tmp_path):
    folder = tiny_model(tmp_path / "teacher", 400)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    samples = [micro_batches((2, 9), (1, 5 + number), seed=number) for number in range(2)]
    expected = [[own_logits(folder, batch) for batch in batches] for batches in samples]

    def rank(number):
        batches = samples[number]
        shared = {"shards": Shards(address, number, 2), "transport": ("hidden", "logits")[number]}
        with TeacherPool([setup(folder, f"rank {number}", **shared)]) as pool:
            for _ in range(2):
                for found, own in zip(pool.run([batches])[0].logits, expected[number], strict=True):
                    torch.testing.assert_close(dense(found), own)
        return True

    with ThreadPoolExecutor(2) as ranks:
        assert all(ranks.map(rank, range(2)))


def test_the_size_of_a_model_is_known_before_it_is_loaded(tmp_path):
    folder = tiny_model(tmp_path / "model", 400)
    assert weight_bytes(str(folder), torch.bfloat16) == sum(
        p.nbytes for p in load_model(str(folder), torch.bfloat16).parameters()
    )
