"""Rivals without a difficulty against plain loops, and what every rival must do."""

import importlib.util
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from helpers.rival_pool import best, by_id, pool, values
from jsonargparse import ArgumentParser

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
    SignalStore,
)
from minirec_pl.utils.errors import InputError

SCORED = [GraNdSelector, EL2NSelector, RewardVarianceSelector, LearnAlignSelector, DEALRecSelector]
NEEDY = [*SCORED, KMeansSelector, KCenterSelector]
ALL = [*NEEDY, RandomSelector, FullSelector]
BY_SCORE = [GraNdSelector, EL2NSelector, RewardVarianceSelector, LearnAlignSelector]
NESTED = [cls for cls in ALL if cls not in (KMeansSelector, FullSelector)]


def test_full_picks_the_whole_pool_whatever_the_budget():
    signals = pool()
    ledger = FullSelector().select(signals, 3)
    assert ledger.selected() == sorted(signals.sample_id.tolist())


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
    monkeypatch.setattr(
        "minirec_pl.selection.selectors.baselines.find_spec", lambda name: None if name == "sklearn" else find(name)
    )
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
    with pytest.warns(UserWarning, match="picked 45 samples instead of 50; of 60 samples 15 never_scored"):
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
    with pytest.raises(InputError, match="give 1 to 60"):
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


@pytest.mark.parametrize("cls", ALL)
def test_every_selector_is_made_from_its_dotted_path(cls):
    parser = ArgumentParser()
    parser.add_argument("--selector", type=Selector)
    config = parser.parse_args([f"--selector=minirec_pl.selection.{cls.__name__}"])
    made = parser.instantiate(config).selector
    assert type(made) is cls
    assert cls.__name__ in parser.dump(config)
    assert made.needs <= {"rewards", "gradient", "embedding"}
