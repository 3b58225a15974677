"""Oracles: the papers' formulas again in plain loops, with the N x N matrices that the selectors do without."""

import math
import statistics

import numpy as np
import pytest
from helpers.rival_pool import best, by_id, pool, values
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from minirec_pl.selection import (
    DEALRecSelector,
    EL2NSelector,
    GraNdSelector,
    LearnAlignSelector,
    RewardVarianceSelector,
)
from minirec_pl.utils.errors import InputError


def test_grand_is_the_norm_of_the_gradient():
    signals = pool()
    norm = {i: math.hypot(*u) for i, u in by_id(signals, "gradient").items()}
    ledger = GraNdSelector().select(signals, 20)
    assert ledger.selected() == best(norm, 20)
    assert values(ledger) == pytest.approx(norm)


def test_el2n_is_the_error_at_the_target():
    exact = np.random.default_rng(1).uniform(size=60)
    exact[::3] = np.nan
    signals = pool(solve_probability=exact)
    share = by_id(signals, "solve_share")
    error = {i: 1 - (share[i] if math.isnan(p) else p) for i, p in by_id(signals, "solve_probability").items()}
    ledger = EL2NSelector().select(signals, 25)
    assert ledger.selected() == best(error, 25)
    assert values(ledger) == pytest.approx(error)
    assert ledger.table.set_index("sample_id")["difficulty"].to_dict() == pytest.approx(
        {i: 1 - e for i, e in error.items()}
    )


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=9))
@settings(deadline=None)
def test_the_full_error_norm_lies_where_the_docstring_says(logits):
    total = math.fsum(math.exp(x) for x in logits)
    p = [math.exp(x) / total for x in logits]
    full = math.hypot(p[0] - 1, *p[1:])
    assert (1 - p[0]) * (1 - 1e-9) <= full <= math.sqrt(2) * (1 - p[0]) * (1 + 1e-9)


def test_reward_variance_is_that_of_the_group_or_of_the_exact_probability():
    random = np.random.default_rng(2)
    groups = random.uniform(size=(60, 5))
    exact = random.uniform(size=60)
    exact[::2] = np.nan
    signals = pool(
        reward_mean=groups.mean(axis=1), reward_std=groups.std(axis=1), solve_share=None, solve_probability=exact
    )
    variance = {
        int(i): statistics.pvariance(group) if math.isnan(p) else p * (1 - p)
        for i, group, p in zip(signals.sample_id, groups.tolist(), exact.tolist(), strict=True)
    }
    ledger = RewardVarianceSelector().select(signals, 30)
    assert ledger.selected() == best(variance, 30)
    assert values(ledger) == pytest.approx(variance)


def test_groups_without_variance_are_dropped_as_too_easy_or_too_hard():
    mean, std = np.full(60, 0.5), np.full(60, 0.5)
    mean[:20], std[:20] = 0.0, 0.0
    mean[20:30], std[20:30] = 1.0, 1e-17
    signals = pool(reward_mean=mean, reward_std=std)
    with pytest.warns(UserWarning, match=r"picked 30 samples instead of 40; of 60 samples 10 too_easy, 20 too_hard"):
        ledger = RewardVarianceSelector().select(signals, 40)
    assert set(ledger.selected()) == set(signals.sample_id[30:].tolist())
    reasons = ledger.rows(signals.sample_id.tolist())["reason"].tolist()
    assert reasons == ["too_hard"] * 20 + ["too_easy"] * 10 + ["selected"] * 30
    with pytest.raises(InputError, match="no sample can be picked; of 60 samples 60 too_hard"):
        RewardVarianceSelector().select(pool(reward_mean=np.zeros(60), reward_std=np.zeros(60)), 5)


def test_learnalign_is_the_row_mean_of_the_matrix():
    exact = np.random.default_rng(3).uniform(size=60)
    signals = pool(solve_probability=exact)
    ids = signals.sample_id.tolist()
    p, u = by_id(signals, "solve_probability"), by_id(signals, "gradient")
    u[ids[4]] = [0.0] * 5
    signals.gradient[4] = 0

    def entry(i, j):
        norms = math.hypot(*u[i]) * math.hypot(*u[j])
        cosine = math.fsum(a * b for a, b in zip(u[i], u[j], strict=True)) / norms if norms else 0.0
        return p[i] * (1 - p[i]) * p[j] * (1 - p[j]) * cosine

    score = {i: math.fsum(entry(i, j) for j in ids) / len(ids) for i in ids}
    ledger = LearnAlignSelector().select(signals, 60)
    assert ledger.selected() == best(score, 60)
    assert values(ledger) == pytest.approx(score, abs=1e-15)


def test_only_present_gradients_form_the_direction():
    fresh = np.arange(60) < 25
    signals = pool(gradient_fresh=fresh)
    u = signals.gradient.numpy()
    weight = (signals.solve_share * (1 - signals.solve_share)).numpy()
    z = u / np.linalg.norm(u, axis=1, keepdims=True) * weight[:, None]
    expected = dict(zip(signals.sample_id.tolist(), z @ z[fresh].mean(axis=0), strict=True))
    assert values(LearnAlignSelector().select(signals, 5)) == pytest.approx(expected)

    curvature = u[fresh].T @ u[fresh] / fresh.sum()
    influence = u @ np.linalg.inv(curvature + 0.01 * np.trace(curvature) / 5 * np.eye(5)) @ u[fresh].mean(axis=0)
    scaled = (influence - influence.min()) / (influence.max() - influence.min())
    expected = dict(zip(signals.sample_id.tolist(), scaled, strict=True))
    assert values(DEALRecSelector(effort_weight=0.0).select(signals, 5)) == pytest.approx(expected)


def dealrec_quotas(score, k, n_groups):
    """Picks per group as the paper's algorithm makes them, one budget at a time."""
    low, width = min(score), (max(score) - min(score)) / n_groups
    group_of = [next((g for g in range(n_groups - 1) if s <= low + (g + 1) * width), n_groups - 1) for s in score]
    groups = sorted((group for group in {g: group_of.count(g) for g in group_of}.items()), key=lambda g: (g[1], g[0]))
    quota, left = {}, k
    while groups:
        name, size = groups[0]
        quota[name] = min(size, left // len(groups))
        left -= quota[name]
        groups = groups[1:]
    return group_of, quota


@given(st.lists(st.floats(0, 5), min_size=1, max_size=20), st.integers(1, 9), st.integers(0, 2))
@example([0.0, 1.0, 2.0, 3.0, 4.0], 4, 0)  # scores on the edges, which belong to the lower group
@settings(deadline=None, max_examples=25)
def test_dealrec_fills_the_published_quotas_at_every_budget(norms, n_groups, seed):
    """One-dimensional gradients along one axis: influence and effort are then both the size of the gradient."""
    edges = np.interp(np.arange(1, n_groups) / n_groups, [0, 1], [min(norms), max(norms)])
    exact = norms == [0.0, 1.0, 2.0, 3.0, 4.0]
    assume(exact or not np.isclose(np.array(norms)[:, None], edges, atol=1e-9).any())
    signals = pool(len(norms), gradient=np.array(norms)[:, None])
    ids = sorted(signals.sample_id.tolist())
    selector = DEALRecSelector(n_groups=n_groups, seed=seed)
    whole = selector.select(signals, len(norms))
    score = values(whole)
    assert sorted(whole.selected()) == ids
    for k in range(1, len(norms) + 1):
        picks = selector.select(signals, k).selected()
        assert picks == whole.selected(k)
        group_of, quota = dealrec_quotas([score[i] for i in ids], k, n_groups)
        taken = [group_of[ids.index(i)] for i in picks]
        assert {group: taken.count(group) for group in quota} == quota


def test_dealrec_score_is_influence_and_weighted_effort():
    signals = pool()
    u = signals.gradient.numpy()

    def scaled(x):
        return (x - x.min()) / (x.max() - x.min())

    curvature = sum(np.outer(row, row) for row in u) / len(u)
    inverse = np.linalg.inv(curvature + 0.01 * np.trace(curvature) / 5 * np.eye(5))
    influence = np.array([row @ inverse @ u.mean(axis=0) for row in u])
    expected = scaled(influence) + 0.3 * scaled(np.linalg.norm(u, axis=1))
    got = values(DEALRecSelector(effort_weight=0.3).select(signals, 5))
    assert got == pytest.approx(dict(zip(signals.sample_id.tolist(), expected, strict=True)))


def test_dealrec_draws_uniformly_within_a_group():
    signals = pool(10, gradient=np.ones((10, 2)))
    counts = np.zeros(10)
    for seed in range(150):
        picks = DEALRecSelector(seed=seed).select(signals, 3).selected()
        counts[np.array(picks) - 100] += 1
    assert abs(counts - 45).max() < 5 * math.sqrt(150 * 0.3 * 0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effort_weight": -1.0}, "effort_weight"),
        ({"effort_weight": math.nan}, "effort_weight"),
        ({"n_groups": 0}, "n_groups is 0: give at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        DEALRecSelector(**options)
