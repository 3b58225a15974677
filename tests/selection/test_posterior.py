"""Oracles: the updates of MoPPS (arXiv 2507.04632) with the prior inside, group by group, in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.selection import SampleSignals, SignalStore, merge_stores

POOL = [7, 3, 9]


def met(store, sample, group, epoch=0, source="train"):
    store.update(SampleSignals([sample], rewards=torch.tensor([group])), epoch=epoch, step=epoch, source=source)


def test_a_hand_worked_example():
    store = SignalStore([4])
    store.discount = 0.5
    store.set_prior(torch.tensor([0.25]), 8.0, epoch=0, step=0)  # Beta(2, 6)
    met(store, 4, [1.0, 0.0, 0.0, 0.0])  # alpha 2 + 1, beta 6 + 3
    assert [float(value) for value in store.posterior()] == [3.0, 9.0]
    met(store, 4, [1.0, 1.0, 1.0, 0.0])  # alpha 1.5 + 1 + 3, beta 4.5 + 3 + 1
    assert [float(value) for value in store.posterior([4])] == [5.5, 8.5]
    assert float(store.posterior_mean([4])) == pytest.approx(5.5 / 14)


groups = st.lists(st.sampled_from([0.0, 0.5, 0.6, 1.0]), min_size=1, max_size=5)
histories = st.lists(st.tuples(st.sampled_from(POOL), groups, st.sampled_from(["train", "score"])), max_size=15)


@given(histories, st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.floats(0.01, 0.99), st.sampled_from([0.5, 16.0]))
@settings(deadline=None)
def test_updates_and_streaks_equal_a_loop(history, discount, mean, strength):
    store = SignalStore(POOL)
    store.discount = discount
    start = strength * mean, strength * (1 - mean)
    known = {sample: [*start, 0, 0, 0] for sample in POOL}
    weights = {sample: [] for sample in POOL}  # of each rollout that counts
    for epoch, (sample, group, source) in enumerate(history):
        met(store, sample, group, epoch, source)
        if source == "score":
            continue
        weights[sample] = [discount * weight for weight in weights[sample]] + [1.0] * len(group)
        alpha, beta, all_hit, all_miss, flat_ever = known[sample]
        hits = sum(reward > 0.5 for reward in group)
        alpha = discount * alpha + (1 - discount) * start[0] + hits
        beta = discount * beta + (1 - discount) * start[1] + len(group) - hits
        flat = len(set(group)) == 1
        all_hit = all_hit + 1 if flat and group[0] > 0.5 else 0
        all_miss = all_miss + 1 if flat and group[0] <= 0.5 else 0
        known[sample] = [alpha, beta, all_hit, all_miss, flat_ever + flat]
    means = torch.full((3,), mean, dtype=torch.float64)
    store.set_prior(means, strength, epoch=0, step=0)  # made anew after the outcomes
    alpha, beta = store.posterior(POOL)
    view = store.read(POOL)
    for row, sample in enumerate(POOL):
        expected = known[sample]
        assert float(alpha[row]) == pytest.approx(expected[0], rel=1e-6)
        assert float(beta[row]) == pytest.approx(expected[1], rel=1e-6)
        assert [int(view.all_hit_streak[row]), int(view.all_miss_streak[row])] == expected[2:4]
        assert int(store.wasted_groups([sample])) == expected[4]
    squares = dict(zip(store.sample_ids.tolist(), store.squared_weights.tolist(), strict=True))
    assert squares == pytest.approx({sample: sum(w**2 for w in weights[sample]) for sample in POOL})


def test_without_a_prior_it_is_uniform_and_an_exact_probability_counts_as_eight_rollouts():
    store = SignalStore(POOL)
    store.update(SampleSignals([3], solve_probability=[0.25]), epoch=0, step=0, source="train")
    store.update(SampleSignals([9], solve_probability=[0.25]), epoch=0, step=0, source="score")
    alpha, beta = store.posterior([3, 7, 9])
    assert (alpha.tolist(), beta.tolist()) == ([3.0, 1.0, 1.0], [7.0, 1.0, 1.0])
    assert store.squared_weights.tolist() == [0.0, 0.0, 0.0]
    assert store.has_outcomes
    assert not store.has_prior


def test_files_keep_it_and_older_ones_have_none(tmp_path):
    store = SignalStore(POOL)
    met(store, 3, [1.0, 1.0])
    store.set_prior(torch.tensor([0.2, 0.3, 0.4]), 10.0, epoch=2, step=5)
    again = SignalStore.load(store.save(tmp_path / "signals.safetensors"))
    assert again.digest() == store.digest()
    assert torch.equal(merge_stores([again, SignalStore([50])]).posterior_mean(POOL), store.posterior_mean(POOL))
    state = store.state_dict()
    added = [name for name in state if name.startswith(("hits", "misses", "prior", "all_"))]
    assert len(added) == 8
    older = SignalStore(POOL)
    met(older, 7, [1.0, 0.0])
    older.load_state_dict({name: value for name, value in state.items() if name not in added})
    assert older.posterior_mean().tolist() == [0.5] * 3
    assert float(older.read([3]).reward_mean) == 1.0
