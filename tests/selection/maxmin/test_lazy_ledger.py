"""Redundant samples are told when a ledger is first read, by the embeddings it was selected with."""

import pandas as pd
import torch
from helpers.rival_pool import random_pool

from minirec_pl.selection import MiniRecSelector, SampleSignals, SelectionLedger, SignalStore


def test_redundancy_is_that_of_the_selections_embeddings_whenever_it_is_read(tmp_path):
    """Read at once, after the store has moved on, and from a checkpoint taken before or after that."""

    def store_and_ledger():
        signals = random_pool(seed=5)
        store = SignalStore(signals.sample_id)
        groups = torch.stack([signals.reward_mean - 0.01, signals.reward_mean + 0.01], dim=1)
        vectors = {"gradient": signals.gradient, "embedding": signals.embedding}
        store.update(SampleSignals(signals.sample_id, rewards=groups, **vectors), epoch=0, step=0, source="score")
        return store, MiniRecSelector().select(store.pool_view(0), 9)

    def move_on(store):
        ids = store.sample_ids[::2]
        store.update(
            SampleSignals(ids, rewards=torch.rand(len(ids), 3), embedding=torch.randn(len(ids), 4)),
            epoch=1,
            step=1,
            source="score",
        )

    store, ledger = store_and_ledger()
    expected = ledger.table
    assert "redundant" in set(expected["reason"])
    store, ledger = store_and_ledger()
    early = ledger.state_dict(embedding=store.vectors()["embedding"])
    torch.save(early, tmp_path / "early.pt")
    at_that_time = store.vectors()["embedding"].clone()
    move_on(store)
    assert not torch.equal(store.vectors()["embedding"], at_that_time)
    late = ledger.state_dict(embedding=store.vectors()["embedding"])
    assert early["unfinished"]
    assert not late["unfinished"]
    loaded = torch.load(tmp_path / "early.pt", weights_only=True)
    for read in (
        ledger,
        SelectionLedger.from_state_dict(late),
        SelectionLedger.from_state_dict(loaded, embedding=at_that_time),
    ):
        pd.testing.assert_frame_equal(read.table, expected)
