"""Mixtures: rows are drawn by weight over epochs, the same from wherever the drawing begins."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.tiny import tiny_tokenizer
from xtoken_core.data.documents import check_corpora
from xtoken_core.data.mixture import Mixture, draws
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.data.reading import Shuffled, rows_of_shards
from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 200), st.integers(0, 12))
@example([1.0, 70.0, 70.0, 70.0, 0.75], 11, 10)  # three parts are owed four items each
def test_draws_keep_to_the_weights(weights, size, epoch):
    share = np.array(weights) / sum(weights)
    before, here = draws(np.array(weights), size, epoch)
    assert before.sum() == epoch * size and here.sum() == size and (here >= 0).all()
    assert (np.abs(before + here - (epoch + 1) * size * share) < 2).all()
    if epoch:
        assert (before == sum(draws(np.array(weights), size, epoch - 1))).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.data())
def test_every_item_of_a_part_comes_equally_often(sizes, data):
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    parts = np.repeat(np.arange(len(sizes)), sizes)
    mixture = Mixture(list(range(len(parts))), parts, weights)
    drawn = np.concatenate([mixture.order(3, epoch) for epoch in range(6)])
    counts = np.bincount(drawn, minlength=len(parts))
    for part in range(len(sizes)):
        assert np.ptp(counts[parts == part]) <= 1


def test_a_mixture_is_the_same_from_wherever_it_is_entered():
    mixture = Mixture(list("aaaaabbb"), np.array([0] * 5 + [1] * 3), [3.0, 1.0])
    whole = Shuffled(mixture, 40, seed=5)
    items = [whole[i] for i in range(40)]
    assert [Shuffled(mixture, 40, seed=5)[i] for i in reversed(range(40))] == items[::-1]  # after a resume, on another rank
    assert items.count("a") == 30 and items != [Shuffled(mixture, 40, seed=6)[i] for i in range(40)]
    with pytest.raises(InputError, match="^data.train.1: no rows to draw by its weight$"):
        Mixture(["a"], np.array([0]), [1.0, 1.0])


def write(folder, **counts):
    for name, count in counts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i} of it"}) + "\n" for i in range(count)))


def mixed(folder, parts, **data):
    """A spec of these parts, each a domain of its own."""
    tiny_tokenizer(300).save_pretrained(folder / "student")
    train = [{"uri": str(folder / f"{name}.jsonl"), "domain": name, **options} for name, options in parts.items()]
    return DistillationSpec.from_text(
        json.dumps(
            {
                "name": "mixed",
                "student": {"model": str(folder / "student")},
                "teachers": [{"id": "same", "model": str(folder / "student")}],
                "data": {"train": train, "max_length": 40, **data},
                "output": {"uri": "unused"},
            }
        )
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_a_domain_without_rows_is_an_error(tmp_path, shards):
    """Its teacher would teach nothing, in silence."""
    write(tmp_path, web=6, code=1)
    (tmp_path / "code.jsonl").write_text('{"text": ""}\n')
    spec = mixed(tmp_path, {"web": {}, "code": {}}, shards=shards)
    folders = [str(tmp_path / f"{shard}") for shard in range(shards)]
    with pytest.raises(InputError, match="^data.train: no rows of the domain code$"):
        for shard, folder in enumerate(folders):
            prepare_rows(spec, f"{folder}/train", shard=shard)
        rows_of_shards(spec.data, folders)
    prepare_rows(mixed(tmp_path, {"web": {}, "code": {}}, max_rows=2), tmp_path / "first")  # the first rows are of the first part


@pytest.mark.parametrize("options", [{}, {"weight": 1}])
def test_a_file_is_of_one_part_only(tmp_path, options):
    write(tmp_path, web=3, code=3)
    check_corpora(mixed(tmp_path, {"web": options, "code": options}))
    with pytest.raises(InputError, match=r"^data.train.1: .*code.jsonl is in data.train.0 too, of another weight or domain$"):
        check_corpora(mixed(tmp_path, {"*": options, "code": options}))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_prepared_parts_are_mixed(tmp_path, packing, shards):
    write(tmp_path, web=12, code=4)
    spec = mixed(tmp_path, {"web": {"weight": 1}, "code": {"weight": 3}}, packing=packing, shards=shards)
    for shard in range(shards):
        prepare_rows(spec, tmp_path / f"{shard}" / "train", shard=shard)
    rows = rows_of_shards(spec.data, [str(tmp_path / f"{shard}") for shard in range(shards)])
    drawn = [Shuffled(rows, 4 * len(rows), seed=0)[i] for i in range(4 * len(rows))]
    domains = [{row["domain"] for row in (item if packing else [item])} for item in drawn]
    assert all(len(of) == 1 for of in domains)
    assert sum(of == {"code"} for of in domains) == 3 * len(rows)
