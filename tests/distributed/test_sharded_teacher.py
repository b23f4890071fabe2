"""A teacher too large for one GPU: its weights spread over its processes on all ranks, each rank with its own samples."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.support.tiny import tiny_model
from tests.teachers.test_teachers import dense, micro_batches, own_logits, setup
from xtoken_core.configs import weight_bytes
from xtoken_core.models import load_model
from xtoken_core.teachers.pool import TeacherPool
from xtoken_core.teachers.setup import Shards
from xtoken_core.training.teachers import sharers

pytestmark = pytest.mark.slow


def hands_over_the_whole_models_logits(folder, devices, own=own_logits, dtype=torch.float32, **tolerance):
    """A rank on each device: its teacher holds its share of the weights, runs samples of its own twice, and gives all logits of those.

    own: from the folder and a micro-batch what the whole model gives.
    """
    address = f"file://{folder}/group-of-{len(devices)}"
    ranks = len(devices)
    samples = [micro_batches((2, 9), (1, 5 + number), seed=number) for number in range(ranks)]
    expected = [[own(folder, batch).cpu() for batch in batches] for batches in samples]

    def rank(number):
        shared = {"shards": Shards(address, number, ranks), "transport": ("hidden", "logits")[number % 2], "dtype": dtype}
        with TeacherPool([setup(folder, f"rank {number}", device=torch.device(devices[number]), **shared)]) as pool:
            for _ in range(2):
                for found, whole in zip(pool.run([samples[number]])[0].logits, expected[number], strict=True):
                    torch.testing.assert_close(dense(found).cpu(), whole, **tolerance)
        return True

    with ThreadPoolExecutor(ranks) as threads:
        return all(threads.map(rank, range(ranks)))


def test_every_rank_gets_the_whole_models_logits_of_its_own_samples(tmp_path):
    assert hands_over_the_whole_models_logits(tiny_model(tmp_path / "teacher", 400), ["cpu", "cpu"])


@pytest.mark.parametrize(("needed", "expected"), [(10, 1), (11, 1), (12, 8), (88, 8), (89, 64)])
def test_no_more_ranks_share_a_teacher_than_must(needed, expected):
    """64 ranks, eight on a host, with room for 11 each."""
    assert sharers(needed, 11.0, 8, 64) == expected


def test_the_size_of_a_model_is_known_before_it_is_loaded(tmp_path):
    folder = tiny_model(tmp_path / "model", 400)
    assert weight_bytes(str(folder), torch.bfloat16) == sum(
        p.nbytes for p in load_model(str(folder), torch.bfloat16).parameters()
    )
