"""Oracles: the papers' formulas again in plain loops, with the N x N matrices that the selectors do without."""

import importlib.util
import itertools
import math
import statistics
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from minirec_pl.errors import InputError
from minirec_pl.selection import (
    DEALRecSelector,
    EL2NSelector,
    FullSelector,
    GraNdSelector,
    KCenterSelector,
    KMeansSelector,
    LearnAlignSelector,
    RandomSelector,
    RewardVarianceSelector,
    SampleSignals,
    Selector,
    Signals,
    SignalStore,
)

SCORED = [GraNdSelector, EL2NSelector, RewardVarianceSelector, LearnAlignSelector, DEALRecSelector]
NEEDY = [*SCORED, KMeansSelector, KCenterSelector]
ALL = [*NEEDY, RandomSelector, FullSelector]
BY_SCORE = [GraNdSelector, EL2NSelector, RewardVarianceSelector, LearnAlignSelector]
NESTED = [cls for cls in ALL if cls not in (KMeansSelector, FullSelector)]


def pool(n=60, seed=0, group=8, **changes):
    random = np.random.default_rng(seed)
    rewards = (random.uniform(size=(n, group)) < random.uniform(0.1, 0.9, size=(n, 1))).astype(float)
    rewards[:, :2] = [0, 1]  # no group without variance
    fields = {
        "sample_id": random.permutation(np.arange(100, 100 + n)),
        "reward_mean": rewards.mean(axis=1),
        "reward_std": rewards.std(axis=1),
        "n_rollouts": np.full(n, group),
        "solve_share": rewards.mean(axis=1),
        "gradient": random.normal(size=(n, 5)),
        "embedding": random.normal(size=(n, 4)),
    }
    return Signals(**(fields | changes))


def by_id(signals, name):
    values = getattr(signals, name)
    return {int(i): row.tolist() for i, row in zip(signals.sample_id, values, strict=True)}


def best(score, k):
    """The k highest scores by sample_id, ties to the smaller id."""
    return sorted(score, key=lambda i: (-score[i], i))[:k]


def values(ledger):
    return ledger.table.set_index("sample_id")["value"].to_dict()


def test_full_picks_the_whole_pool_whatever_the_budget():
    signals = pool()
    ledger = FullSelector().select(signals, 3)
    assert ledger.selected() == sorted(signals.sample_id.tolist())


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
    with pytest.warns(UserWarning, match=r"picked 30 samples instead of 40: of 60 samples 10 too_easy, 20 too_hard"):
        ledger = RewardVarianceSelector().select(signals, 40)
    assert set(ledger.selected()) == set(signals.sample_id[30:].tolist())
    reasons = ledger.rows(signals.sample_id.tolist())["reason"].tolist()
    assert reasons == ["too_hard"] * 20 + ["too_easy"] * 10 + ["selected"] * 30
    with pytest.raises(InputError, match="no sample can be picked: of 60 samples 60 too_hard"):
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


def test_k_center_takes_the_farthest_sample_each_time():
    signals = pool(40)
    unit = {i: np.array(e) / math.hypot(*e) for i, e in by_id(signals, "embedding").items()}
    centers, distances = [min(unit)], [1.0]
    while len(centers) < 12:
        gap = {i: min(1 - float(unit[i] @ unit[c]) for c in centers) for i in unit if i not in centers}
        centers.append(best(gap, 1)[0])
        distances.append(gap[centers[-1]])
    ledger = KCenterSelector().select(signals, 12)
    assert ledger.selected() == centers
    rows = ledger.rows(centers)
    assert rows["value"].tolist() == pytest.approx(distances)
    assert rows["novelty"].tolist() == rows["value"].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_k_center_covers_within_twice_the_best_radius(seed):
    signals = pool(12, seed=seed)
    e = signals.embedding.numpy() / np.linalg.norm(signals.embedding.numpy(), axis=1, keepdims=True)
    distance = np.linalg.norm(e[:, None] - e, axis=2)
    least = min(distance[list(rows)].min(axis=0).max() for rows in itertools.combinations(range(12), 3))
    picks = KCenterSelector().select(signals, 3).selected()
    rows = [signals.sample_id.tolist().index(i) for i in picks]
    assert distance[rows].min(axis=0).max() <= 2 * least


def clustered(n_clusters=5, each=12, seed=0):
    """Embeddings in tight bundles of different lengths, and the bundle of each."""
    random = np.random.default_rng(seed)
    centers = np.eye(n_clusters, 8)
    bundle = np.repeat(np.arange(n_clusters), each)
    points = centers[bundle] + 0.05 * random.normal(size=(len(bundle), 8))
    return points * random.uniform(0.5, 2.0, size=(len(bundle), 1)), bundle


def test_k_means_picks_the_sample_nearest_to_each_centroid():
    points, bundle = clustered()
    signals = pool(60, embedding=points)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    nearest = set()
    for one in range(5):
        rows = np.flatnonzero(bundle == one)
        center = unit[rows].mean(axis=0)
        nearest.add(int(signals.sample_id[rows[np.linalg.norm(unit[rows] - center, axis=1).argmin()]]))
    ledger = KMeansSelector().select(signals, 5)
    assert set(ledger.selected()) == nearest
    assert min(values(ledger).values()) > 0.9


def test_k_means_ranks_by_the_size_of_the_cluster():
    points = np.repeat(np.eye(3), [2, 7, 4], axis=0)
    signals = pool(13, embedding=points, sample_id=np.arange(13))
    assert KMeansSelector().select(signals, 3).selected() == [2, 9, 0]


def test_k_means_picks_distinct_samples_of_repeated_embeddings():
    signals = pool(20, embedding=np.repeat(np.eye(4), 5, axis=0), sample_id=np.arange(20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picks = KMeansSelector().select(signals, 9).selected()
    assert len(set(picks)) == 9
    assert {0, 5, 10, 15} <= set(picks)


def test_k_means_depends_on_the_seed_alone():
    signals = pool(200)
    first = KMeansSelector(seed=1).select(signals, 20).selected()
    assert first == KMeansSelector(seed=1).select(signals, 20, epoch=7).selected()
    assert first != KMeansSelector(seed=2).select(signals, 20).selected()


def test_k_means_without_scikit_learn_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("minirec_pl.selection.rivals.find_spec", lambda name: None if name == "sklearn" else find(name))
    with pytest.raises(InputError, match=r"needs scikit-learn: pip install 'minirec-pl\[kmeans\]'"):
        KMeansSelector()


@pytest.mark.parametrize("cls", ALL)
def test_order_of_the_rows_does_not_matter(cls):
    signals = pool()
    turned = signals.take(torch.randperm(60, generator=torch.Generator().manual_seed(0)))
    ledger = cls().select(signals, 20)
    assert ledger.table.equals(cls().select(turned, 20).table)
    assert ledger.n_selected == (60 if cls is FullSelector else 20)


@pytest.mark.parametrize("cls", NESTED)
def test_smaller_budget_is_a_prefix(cls):
    signals = pool()
    largest = cls().select(signals, 60)
    for k in (1, 7, 30, 59):
        assert cls().select(signals, k).selected() == largest.selected(k)


@pytest.mark.parametrize("cls", [*BY_SCORE, KCenterSelector, KMeansSelector])
def test_ties_go_to_the_smaller_sample_id(cls):
    same = {
        "reward_mean": np.full(60, 0.5),
        "reward_std": np.full(60, 0.5),
        "solve_share": np.full(60, 0.5),
        "gradient": np.ones((60, 5)),
        "embedding": np.ones((60, 4)),
    }
    assert cls().select(pool(**same), 10).selected() == list(range(100, 110))


@pytest.mark.parametrize("cls", NEEDY)
def test_samples_without_signals_are_never_scored_and_never_picked(cls):
    known = np.arange(60) >= 15
    unknown = {name: np.where(known, getattr(pool(), name), np.nan) for name in ("reward_mean", "reward_std")}
    unknown["solve_share"] = unknown["reward_mean"]
    gradient = pool().gradient.numpy() * known[:, None]
    signals = pool(gradient=gradient, gradient_known=known, embedding_known=known, **unknown)
    with pytest.warns(UserWarning, match="picked 45 samples instead of 50: of 60 samples 15 never_scored"):
        ledger = cls().select(signals, 50)
    assert set(ledger.selected()) == set(signals.sample_id[15:].tolist())
    lost = ledger.rows(signals.sample_id[:15].tolist())
    assert set(lost["reason"]) == {"never_scored"}
    assert lost["value"].isna().all()
    assert ledger.rows(ledger.selected())["value"].notna().all()


@pytest.mark.parametrize("cls", NEEDY)
def test_a_missing_signal_is_named(cls):
    for name in cls().needs:
        lacking = {"reward_mean": np.full(60, np.nan), "reward_std": np.full(60, np.nan), "solve_share": None}
        lacking = lacking if name == "rewards" else {name: None}
        with pytest.raises(InputError, match=rf"{cls.__name__} needs .*return `{name}`.* from sample_signals"):
            cls().select(pool(**lacking), 5)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("k", [0, 61])
def test_budget_outside_the_pool(cls, k):
    with pytest.raises(InputError, match=r"1\.\.60"):
        cls().select(pool(), k)


@pytest.mark.parametrize("cls", ALL)
def test_single_sample(cls):
    one = pool().take(torch.tensor([3]))
    assert cls().select(one, 1).selected() == one.sample_id.tolist()


@pytest.mark.parametrize("cls", NEEDY)
@pytest.mark.parametrize(
    "changes", [{"gradient": np.zeros((60, 5))}, {"embedding": np.zeros((60, 4))}], ids=["gradients", "embeddings"]
)
def test_zero_vectors_still_give_k_distinct_picks(cls, changes):
    ledger = cls().select(pool(**changes), 12)
    assert len(set(ledger.selected())) == 12
    assert ledger.rows(ledger.selected())["value"].notna().all()


@pytest.mark.parametrize("cls", NEEDY)
def test_half_precision_vectors_are_taken(cls):
    exact = pool()
    half = pool(gradient=exact.gradient.half(), embedding=exact.embedding.half())
    full = pool(gradient=half.gradient.double(), embedding=half.embedding.float())
    assert cls().select(half, 20).selected() == cls().select(full, 20).selected()


@pytest.mark.parametrize("cls", NEEDY)
def test_a_store_with_part_of_the_pool_scored(cls):
    store, random = SignalStore(range(30)), torch.Generator().manual_seed(0)
    rewards = torch.rand(20, 4, generator=random).round()
    rewards[:, :2] = torch.tensor([0.0, 1.0])
    vectors = {name: torch.randn(20, 3, generator=random) for name in ("gradient", "embedding")}
    store.update(SampleSignals(range(5, 25), rewards=rewards, **vectors), epoch=0, step=0, source="score")
    ledger = cls().select(store.pool_view(3), 8)
    assert set(ledger.selected()) <= set(range(5, 25))
    unscored = ledger.rows([*range(5), *range(25, 30)])
    assert set(unscored["reason"]) == {"never_scored"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effort_weight": -1.0}, "effort_weight"),
        ({"effort_weight": math.nan}, "effort_weight"),
        ({"n_groups": 0}, "n_groups must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        DEALRecSelector(**options)


@pytest.mark.parametrize("cls", ALL)
def test_every_selector_is_made_from_its_dotted_path(cls):
    parser = ArgumentParser()
    parser.add_argument("--selector", type=Selector)
    config = parser.parse_args([f"--selector=minirec_pl.selection.{cls.__name__}"])
    made = parser.instantiate(config).selector
    assert type(made) is cls
    assert cls.__name__ in parser.dump(config)
    assert made.needs <= {"rewards", "gradient", "embedding"}
