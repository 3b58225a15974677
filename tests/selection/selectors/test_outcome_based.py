"""Oracles: GRESO and MoPPS as plain loops, written from the papers and, where those are silent, their code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from minirec_pl.selection import GRESOSelector, MoPPSSelector, SampleSignals, SignalStore
from minirec_pl.selection.selectors.outcome_based import thompson_draw
from minirec_pl.utils.errors import InputError


def store_of(histories, discount=0.5):
    """A store that met these groups, an epoch each; None where a sample was not met."""
    store = SignalStore(range(100, 100 + len(histories)))
    store.discount = discount
    for epoch in range(max(map(len, histories))):
        ids = [100 + row for row, groups in enumerate(histories) if len(groups) > epoch and groups[epoch] is not None]
        if ids:
            rewards = torch.tensor([histories[i - 100][epoch] for i in ids]).float()
            store.update(SampleSignals(ids, rewards=rewards), epoch=epoch, step=epoch, source="train")
    return store


group = st.sampled_from([[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
pools = st.lists(st.lists(st.none() | group, max_size=5), min_size=1, max_size=12).filter(lambda pool: any(pool))


@given(pools, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.3, 0.5]), st.data())
@settings(deadline=None)
def test_mopps_equals_the_paper(histories, discount, target, data):
    alpha, beta = [1.0] * len(histories), [1.0] * len(histories)
    for row, groups in enumerate(histories):
        for rewards in groups:
            if rewards is not None:
                alpha[row] = discount * alpha[row] + (1 - discount) * 1.0 + sum(rewards)
                beta[row] = discount * beta[row] + (1 - discount) * 1.0 + 4 - sum(rewards)
    epoch = data.draw(st.integers(0, 3))
    drawn = np.random.default_rng([7, epoch]).beta(alpha, beta)
    nearest = sorted(range(len(histories)), key=lambda row: ((drawn[row] - target) ** 2, row))
    k = data.draw(st.integers(1, len(histories)))
    view = store_of(histories, discount).pool_view(9)
    ledger = MoPPSSelector(target, discount, seed=7).select(view, k, epoch=epoch)
    assert ledger.selected() == [100 + row for row in nearest[:k]]
    assert ledger.columns["value"] == pytest.approx(-((drawn - target) ** 2))


def test_draws_follow_the_beta():
    for alpha, beta in ((0.4, 3.0), (1.0, 1.0), (5.5, 8.5), (30.0, 2.0)):
        one = torch.full((4000,), alpha).double(), torch.full((4000,), beta).double()
        drawn = thompson_draw(*one, seed=1, epoch=2)
        assert stats.kstest(drawn.numpy(), stats.beta(alpha, beta).cdf).pvalue > 0.001
        assert torch.equal(drawn, thompson_draw(*one, seed=1, epoch=2))
        assert not torch.equal(drawn, thompson_draw(*one, seed=1, epoch=3))


def greso_keep(groups, p_easy, p_hard):
    """Whether a group was all hits or all misses, counted from the last one back (easy/hard_probabilistic_skip)."""
    groups = [rewards for rewards in groups if rewards is not None]
    keep = 1.0
    for base, reward in ((p_easy, 1), (p_hard, 0)):
        count = 0
        for rewards in reversed(groups):
            if any(r != reward for r in rewards):
                break
            count += 1
        if count:
            keep *= max(base**count, 0.01)
    return keep


@given(pools, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.5, 0.95]), st.integers(0, 2))
@settings(deadline=None)
def test_greso_skips_as_published(histories, p_easy, p_hard, epoch):
    selector = GRESOSelector(p_easy, p_hard, step=0.0, seed=5)
    view = store_of(histories).pool_view(9)
    ledger = selector.select(view, len(histories), epoch=epoch)
    base = [min(max(p, 0.05), 0.95) if any(map(any_met, histories)) else p for p in (p_easy, p_hard)]
    keep = [greso_keep(groups, *base) for groups in histories]
    assert ledger.columns["value"] == pytest.approx(keep)

    random = np.random.default_rng([5, epoch])
    order, number = random.permutation(len(histories)), random.random(len(histories))
    left, picks, skips = list(order), [], 1
    while left:  # passes over the data, each of which skips with 1 - keep on its own
        kept = [row for row in left if number[row] < 1 - (1 - keep[row]) ** skips]
        picks += kept
        left = [row for row in left if row not in kept]
        skips += 1
    assert ledger.selected() == [100 + row for row in picks]


def any_met(groups):
    return any(rewards is not None for rewards in groups)


def test_greso_skips_as_often_as_it_says():
    histories = [[[0, 0]] * 2] * 6000 + [[[0, 1]]] * 2000
    selector = GRESOSelector(p_hard=0.5, step=0.0)
    first = selector.select(store_of(histories).pool_view(2), 3200).selected()
    kept = [len([i for i in first if (i < 6100) == flat]) for flat in (True, False)]
    assert kept[0] / kept[1] == pytest.approx(0.25 * 6000 / 2000, rel=0.08)


def test_greso_adjusts_its_probabilities_to_the_groups_met_since():
    easy, hard, mixed = [1, 1], [0, 0], [0, 1]
    rounds = [  # all-hit and all-miss shares of the groups of an epoch; a target of 0.3 makes 0.1 and 0.2
        ([mixed] * 10, (+1, +1)),
        ([easy] * 2 + [mixed] * 8, (-1, +1)),
        ([easy] * 1 + [hard] * 2 + [mixed] * 7, (-1, -1)),
        ([hard] * 10, (+1, -1)),
    ]
    store, selector = SignalStore(range(10)), GRESOSelector(target_zero_variance=0.3, step=0.02)
    selector.select(store.pool_view(0), 5, epoch=0)
    assert (selector.p_easy, selector.p_hard) == (0.5, 0.5)
    p_easy = p_hard = 0.5
    for epoch, (groups, moves) in enumerate(rounds):
        met = SampleSignals(list(range(10)), rewards=torch.tensor(groups).float())
        store.update(met, epoch=epoch, step=epoch, source="train")
        again = GRESOSelector(target_zero_variance=0.3, step=0.02)
        again.load_state_dict(selector.state_dict())
        picked = selector.select(store.pool_view(epoch + 1), 5, epoch=epoch + 1).selected()
        assert again.select(store.pool_view(epoch + 1), 5, epoch=epoch + 1).selected() == picked
        p_easy, p_hard = p_easy + 0.02 * moves[0], p_hard + 0.02 * moves[1]
        assert (selector.p_easy, selector.p_hard) == pytest.approx((p_easy, p_hard))
        assert selector.select(store.pool_view(epoch + 1), 5, epoch=epoch + 1).selected() == picked  # once an epoch
        assert (selector.p_easy, selector.p_hard) == pytest.approx((p_easy, p_hard))
    for _ in range(100):
        selector._adjust(torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool))
    assert (selector.p_easy, selector.p_hard) == (0.05, 0.95)


@pytest.mark.parametrize("make", [MoPPSSelector, GRESOSelector])
def test_order_prefix_and_what_they_need(make):
    random = np.random.default_rng(0)
    histories = [[random.integers(0, 2, 2).tolist() for _ in range(2)] for _ in range(40)]
    view = store_of(histories).pool_view(3)
    whole = make().select(view, 40, epoch=3).selected()
    assert sorted(whole) == list(range(100, 140))
    assert make().select(view.take(torch.randperm(40)), 15, epoch=3).selected() == whole[:15]
    assert make().select(view, 40, epoch=4).selected() != whole
    view.hits = view.misses = view.all_hit_streak = view.all_miss_streak = None
    with pytest.raises(
        InputError, match=f"{make.__name__} goes by the .* met in training, of which these signals hold"
    ):
        make().select(view, 5)


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (MoPPSSelector, {"target": 1.5}, "target is 1.5"),
        (MoPPSSelector, {"discount": -0.1}, "discount is -0.1"),
        (MoPPSSelector, {"prior": (1.0, float("nan"))}, r"prior is \[1.0, nan\]: give \[alpha, beta\]"),
        (MoPPSSelector, {"prior": (float("inf"), 1.0)}, r"prior is \[inf, 1.0\]"),
        (MoPPSSelector, {"prior": (0.0, 1.0)}, r"prior is \[0.0, 1.0\]: give \[alpha, beta\], both above 0"),
        (GRESOSelector, {"p_easy": 2.0}, "p_easy is 2.0"),
        (GRESOSelector, {"target_zero_variance": math.inf}, "target_zero_variance is inf"),
        (GRESOSelector, {"step": 1.0}, "step is 1.0"),
        (GRESOSelector, {"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options(make, options, sentence):
    with pytest.raises(InputError, match=sentence):
        make(**options)
