"""No history, mask or warm-start pair knows its target's timestamp or later; sample_ids name the same sample always.

The truth comes from plain loops over the rows as written, in :func:`toy_data.known_before`, never from the library.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.toy_data import known_before, random_rows, write_dataset

from minirec_pl.data.datamodule import RecDataModule

WINDOW = 7


def data_module(root, **options):
    data = RecDataModule(
        str(root), "toy", **{"history_window": WINDOW, "batch_size": 16, "eval_batch_size": 32, **options}
    )
    data.setup()
    return data


def sample_batches(data):
    return {
        "pool": list(data.train_dataloader()),
        "validation": list(data.val_dataloader()),
        "test": list(data.test_dataloader()),
        "predict": list(data.predict_dataloader()),
    }


def unpadded(row):
    return [value for value in row.tolist() if value >= 0]


@pytest.mark.parametrize("seed", [0, 1])
def test_histories_and_masks_hold_exactly_what_was_strictly_earlier(tmp_path, seed):
    rows = random_rows(seed, n_items=400)
    write_dataset(tmp_path, rows)
    data, truth = data_module(tmp_path), known_before(rows)
    item_ids = data.catalogue.item_ids
    checked = 0
    for batches in sample_batches(data).values():
        for batch in batches:
            for row, sample_id in enumerate(batch["sample_id"].tolist()):
                user, item, _, before = truth[sample_id]
                assert data.table.user_ids[batch["user"][row]] == user
                assert item_ids[batch["target"][row]] == item
                assert [item_ids[index] for index in unpadded(batch["history"][row])] == before[-WINDOW:]
                assert {item_ids[index] for index in unpadded(batch["seen"][row])} == set(before)
                assert item not in before
                checked += 1
    assert checked > 200


def test_no_item_a_sample_is_given_was_met_at_its_timestamp_or_later(tmp_path):
    """Here every interaction has its own item, so an item tells when it was met."""
    rows = random_rows(2, unique_items=True)
    write_dataset(tmp_path, rows)
    data = data_module(tmp_path)
    met = {data.catalogue.index_of(item): (user, time) for user, item, time in rows}
    given = 0
    for batches in sample_batches(data).values():
        for batch in batches:
            for target, history, seen in zip(batch["target"].tolist(), batch["history"], batch["seen"], strict=True):
                user, time = met[target]
                for index in unpadded(history) + unpadded(seen):
                    assert met[index][0] == user
                    assert met[index][1] < time
                    given += 1
    assert given > 5000


@pytest.mark.parametrize("window", [1, 2, 5, 50])
def test_no_warm_start_pair_knows_its_timestamp_or_later(tmp_path, window):
    rows = random_rows(3, unique_items=True)
    write_dataset(tmp_path, rows)
    data = data_module(tmp_path, train_on="warm", history_window=window, warm_batch_size=4)
    met = {data.catalogue.index_of(item): (user, time) for user, item, time in rows}
    truth = known_before(rows)
    latest_of_warm = truth[data.split.warm_end - 1][2]
    first_of_pool = truth[data.split.warm_end][2]
    pairs = 0
    for epoch in range(3):
        data.train_sampler.set_epoch(epoch)
        for batch in data.train_dataloader():
            assert batch["sequence"].shape[1] <= window
            keys = ("row", "position", "target", "sample_id")
            for row, position, target, sample_id in zip(*(batch[key].tolist() for key in keys), strict=True):
                user, item, time, _ = truth[sample_id]
                assert data.catalogue.item_ids[target] == item
                assert time <= latest_of_warm < first_of_pool
                context = batch["sequence"][row, : position + 1].tolist()
                assert all(met[index][0] == user and met[index][1] < time for index in context)
                assert [met[index][1] for index in context] == sorted(met[index][1] for index in context)
                following = batch["sequence"][row, position + 1 :].tolist()
                assert all(index == -1 or met[index][1] >= time for index in following)
                pairs += 1
    assert pairs > 300


def test_changing_the_future_changes_nothing_earlier(tmp_path):
    rows = random_rows(4)
    truth = known_before(rows)
    present = truth[int(0.85 * len(rows))][2]
    items = np.random.default_rng(0).permutation([f"i{i}" for i in range(60)])
    changed = [(u, items[k % 60] if time >= present else item, time) for k, (u, item, time) in enumerate(rows)]
    catalogue = [(f"i{i}", f"Item {i}") for i in range(60)]
    for name, version in (("before", rows), ("after", changed)):
        write_dataset(tmp_path / name, version, catalogue)
    assert rows != changed
    for train_on in ("warm", "pool"):
        before, after = (data_module(tmp_path / name, train_on=train_on) for name in ("before", "after"))
        ids = [i for i in range(len(rows)) if truth[i][2] < present and before.table.eligible[i]]
        first, second = (list(data.sample_loader(np.array(ids))) for data in (before, after))
        torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True)
    for a, b in zip(
        data_module(tmp_path / "before", train_on="warm").train_dataloader(),
        data_module(tmp_path / "after", train_on="warm").train_dataloader(),
        strict=True,
    ):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_sample_id_names_the_same_sample_whatever_the_options(tmp_path):
    rows = random_rows(5)
    write_dataset(tmp_path, rows)
    truth = known_before(rows)
    versions = [
        {},
        {"seed": 7},
        {"warm_fraction": 0.3},
        {"history_window": 3},
        {"split": (0.5, 0.2, 0.3)},
        {"train_on": "warm", "seed": 1, "warm_fraction": 0.6, "history_window": 2},
    ]
    pools = set()
    for options in versions:
        data = data_module(tmp_path, **options)
        pools.add(tuple(data.pool_ids))
        ids = np.flatnonzero(data.table.eligible)
        for batch in data.sample_loader(ids):
            for sample_id, user, target in zip(
                *(batch[k].tolist() for k in ("sample_id", "user", "target")), strict=True
            ):
                assert (data.table.user_ids[user], data.catalogue.item_ids[target]) == truth[sample_id][:2]
    assert len(pools) > 2


def test_parts_are_disjoint_ordered_in_time_and_complete(tmp_path):
    rows = random_rows(6, n_items=200)
    write_dataset(tmp_path, rows)
    truth = known_before(rows)
    data = data_module(tmp_path)
    parts = [data.warm_ids, data.pool_ids, data.val_ids, data.test_ids]
    for earlier, later in pairwise(parts):
        assert max(truth[i][2] for i in earlier) < min(truth[i][2] for i in later)
    eligible = [i for i, (_, item, _, before) in enumerate(truth) if before and item not in before]
    assert np.concatenate(parts).tolist() == eligible
    assert len(eligible) < len(rows)
