"""Oracles: counts and means of one sample at a time."""

import math

import numpy as np
import pytest

from minirec_pl.data.sample_features import sample_features
from minirec_pl.data.samples import SampleTable
from minirec_pl.data.sequence_table import SequenceTable


def random_table(n=300, n_users=30, n_items=25, seed=0):
    random = np.random.default_rng(seed)
    users = [f"u{i}" for i in random.integers(n_users, size=n)]
    items = np.minimum(random.geometric(0.15, size=n) - 1, n_items - 1)
    return SampleTable(users, items, random.integers(0, 100 * 86_400, size=n).astype(float), n_items)


def test_features_equal_counts_of_single_samples():
    table = random_table()
    known, train, ids = np.arange(100), np.arange(250), np.arange(100, 250)
    found = sample_features(table, ids, known, train)
    for row, i in enumerate(ids):
        one = found.table.iloc[row]
        popularity = sum(table.item[j] == table.item[i] for j in known)
        assert one["log_popularity"] == pytest.approx(math.log1p(popularity))
        assert one["cold"] == float(popularity == 0)
        assert one["history_length"] == pytest.approx(math.log1p(len(table.history(i))))
        days = (max(table.timestamp[ids]) - table.timestamp[i]) / 86_400
        assert one["age"] == pytest.approx(math.log1p(days))
        assert one["user_activity"] == pytest.approx(math.log1p(sum(table.user[j] == table.user[i] for j in train)))
        target, history = np.split(found.vectors[row], 2)
        assert one["similarity"] == pytest.approx(float(target @ history), abs=1e-6)
        assert np.linalg.norm(target) == pytest.approx(float(popularity > 0), abs=1e-6)


def test_a_history_vector_is_the_mean_of_its_last_items():
    table = random_table(seed=1)
    ids = np.flatnonzero(table.eligible)
    found = sample_features(table, ids, np.arange(300), np.arange(300))
    factor = {table.item[i]: found.vectors[row, :16] for row, i in enumerate(ids)}
    checked = 0
    for row, i in enumerate(ids):
        last = table.history(i, 10)
        if all(item in factor for item in last):
            mean = np.mean([factor[item] for item in last], axis=0)
            assert found.vectors[row, 16:] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)
            checked += 1
    assert checked > 100


def cosines(table, known, i):
    """Of the users that had the target of a sample and those that had each of its last items, by sets."""
    had = {}
    for user, item in table.interactions(known):
        had.setdefault(item, set()).add(user)
    target = had.get(table.item[i], set())
    others = [had.get(item, set()) for item in table.history(i, 10)]
    return [len(target & other) / math.sqrt(max(1, len(target) * len(other))) for other in others] or [0.0]


@pytest.mark.parametrize("made", ["log", "sequences"])
@pytest.mark.parametrize("dense", [1, 60, 10_000])
def test_cooccurrence_equals_sets_of_users(made, dense, monkeypatch):
    monkeypatch.setattr("minirec_pl.data.sample_features._DENSE", dense)
    table = random_table(seed=2)
    if made == "sequences":
        random = np.random.default_rng(3)
        histories = [random.integers(25, size=n) for n in random.integers(0, 14, size=300)]
        table = SequenceTable([f"u{n % 80}" for n in range(300)], random.integers(25, size=300), histories, 25)
    known, ids = np.arange(120), np.random.default_rng(4).permutation(300)[:200]
    found = sample_features(table, ids, known, known).table
    expected = [cosines(table, known, i) for i in ids]
    assert found["cooccurrence"].to_numpy() == pytest.approx(np.array([np.mean(c) for c in expected]), abs=1e-6)
    assert found["best_cooccurrence"].to_numpy() == pytest.approx(np.array([max(c) for c in expected]), abs=1e-6)
    assert found["cooccurrence"].max() > 0.2


def test_cooccurrence_of_many_pairs_is_of_users_drawn_at_random(monkeypatch):
    table = random_table(n=3_000, n_users=400, seed=5)
    known, ids = np.arange(2_000), np.arange(2_000, 3_000)
    whole = sample_features(table, ids, known, known).table["cooccurrence"]
    monkeypatch.setattr("minirec_pl.data.sample_features._PAIRS", 3_000)
    some = sample_features(table, ids, known, known).table["cooccurrence"]
    assert not np.allclose(whole, some)
    assert np.corrcoef(whole, some)[0, 1] > 0.7
    monkeypatch.setattr("minirec_pl.data.sample_features._PAIRS", 0)  # one user at least
    assert np.isfinite(sample_features(table, ids, known, known).table.to_numpy()).all()


@pytest.mark.parametrize("known", [np.arange(0), np.arange(1), np.arange(2)])
def test_almost_nothing_known(known):
    table = SampleTable(["u", "u", "v", "u"], [0, 1, 1, 2], [1.0, 2.0, 2.0, 3.0], 4)
    found = sample_features(table, np.array([1, 3]), known, np.arange(4))
    assert np.isfinite(found.table.to_numpy()).all()
    assert np.isfinite(found.vectors).all()
    assert sample_features(table, np.arange(0), known, np.arange(4)).table.shape == (0, 8)


@pytest.mark.filterwarnings("error")
def test_users_of_the_same_items():
    users, items = [f"u{i % 3}" for i in range(12)], [i // 3 for i in range(12)]
    table = SampleTable(users, items, np.arange(12.0), 4)
    found = sample_features(table, np.arange(6, 12), np.arange(12), np.arange(12))
    assert found.table["similarity"].to_numpy() == pytest.approx(np.ones(6), abs=1e-6)
    assert np.isfinite(found.vectors).all()


def test_ready_made_sequences():
    table = SequenceTable(["u", "v", "w", "w"], [2, 0, 1, 3], [[0, 1], [1], [], [1, 0, 2]], 4)
    found = sample_features(table, np.arange(4), np.arange(4), np.arange(4))
    assert found.table["history_length"].tolist() == pytest.approx([math.log1p(n) for n in (2, 1, 0, 3)])
    assert found.table["cold"].tolist() == [0.0] * 4
    assert not found.vectors[2, found.vectors.shape[1] // 2 :].any()
