from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.toy_data import random_rows, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.samples import SampleTable
from minirec_pl.data.warm_batches import WarmChunkSampler, WarmDataset
from minirec_pl.utils.errors import InputError


def line(n, times=None):
    """One user with n interactions of different items."""
    return SampleTable(["u"] * n, np.arange(n), np.arange(n) if times is None else times, n)


def pairs_of(batch):
    return list(zip(*(batch[key].tolist() for key in ("row", "position", "target", "sample_id")), strict=True))


def test_worked_example():
    table = SampleTable(["u", "u", "u", "u", "v", "v"], [0, 1, 2, 3, 4, 5], [1, 2, 2, 3, 2, 9], 6)
    batch = WarmDataset(table, 2).__getitems__([(0, 2, 1, 4), (3, 5)])
    assert table.item[[0, 2, 1, 4]].tolist() == [0, 2, 1, 3]
    assert batch["sequence"].tolist() == [[0, 2, 1], [4, 5, -1]]
    assert pairs_of(batch) == [(0, 0, 2, 2), (0, 0, 1, 1), (0, 2, 3, 4), (1, 0, 5, 5)]
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_repeats_and_ties_at_the_start_give_no_pair():
    table = SampleTable(["u"] * 5, [0, 1, 0, 2, 1], [1, 1, 2, 3, 4], 3)
    batch = WarmDataset(table, 1).__getitems__([(0, 1, 2, 3, 4)])
    assert pairs_of(batch) == [(0, 2, 2, 3)]
    nothing = WarmDataset(table, 1).__getitems__([(0, 1)])
    assert pairs_of(nothing) == []
    assert nothing["sequence"].shape == (1, 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(1, 12), st.integers(0, 3))
def test_each_target_sits_in_exactly_one_chunk(n, window, seed):
    sampler = WarmChunkSampler(line(n), n, window, seed=seed)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        chunks = sorted(sampler)
        assert len(chunks) == len(sampler) == sampler.n_chunks
        assert all(2 <= len(chunk) <= window + 1 for chunk in chunks)
        assert [target for chunk in chunks for target in chunk[1:]] == list(range(1, n))
        assert all(earlier[-1] == later[0] for earlier, later in pairwise(chunks))


def test_borders_move_by_at_least_half_a_window_and_ties_are_shuffled():
    for n in range(12, 60):
        sampler = WarmChunkSampler(line(n), n, 10)
        firsts = set()
        for epoch in range(200):
            sampler.set_epoch(epoch)
            firsts.add(len(min(sampler)))
        assert len(firsts) >= 5
    sampler = WarmChunkSampler(line(4, [1, 2, 2, 2]), 4, 10)
    orders = set()
    for epoch in range(100):
        sampler.set_epoch(epoch)
        orders |= set(sampler)
    assert len(orders) == 6
    assert all(order[0] == 0 for order in orders)


def test_seed_and_epoch_decide_alone(toy):
    def epochs(seed):
        data = RecDataModule(str(toy[0]), "toy", train_on="warm", history_window=6, seed=seed)
        data.setup()
        sampler = data.train_sampler
        orders = []
        for epoch in (1, 0, 1):
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
        return orders

    first = epochs(0)
    assert first[0] == first[2] != first[1]
    assert epochs(0) == first
    assert epochs(1)[0] != first[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_pairs_are_warm_eligible_and_nearly_complete(tmp_path, workers):
    write_dataset(tmp_path, random_rows(n=1500, n_items=400, n_users=8))
    data = RecDataModule(
        str(tmp_path), "toy", train_on="warm", history_window=20, warm_batch_size=4, num_workers=workers
    )
    data.setup()
    met = set()
    for epoch in range(6):
        data.train_sampler.set_epoch(epoch)
        ids = torch.cat([batch["sample_id"] for batch in data.train_dataloader()]).tolist()
        assert len(ids) == len(set(ids)) > 0.7 * len(data.warm_ids)
        met |= set(ids)
    assert met <= set(data.warm_ids.tolist())
    assert len(met) > 0.95 * len(data.warm_ids)
    assert not met & set(data.pool_ids.tolist())


def test_two_ranks_share_the_chunks():
    table = line(40)
    whole = WarmChunkSampler(table, 40, 4)
    ranks = [WarmChunkSampler(table, 40, 4, num_replicas=2, rank=rank) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == -(-len(whole) // 2)
    assert set(ranks[0]) | set(ranks[1]) == set(whole)


def test_a_part_without_any_pair():
    with pytest.raises(InputError, match="no interaction with a history before it: raise warm_fraction"):
        WarmChunkSampler(line(3, [1, 1, 1]), 3, 5)
