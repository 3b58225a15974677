"""Predictions of known pools, and what they may not know."""

import math
import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score

from minirec_pl.selection import PredictedDifficulty, PredictedSelector, SampleSignals, SignalStore, calibration
from minirec_pl.selection.predicted import table_features
from minirec_pl.utils.errors import InputError


def known_pool(n=2000, seed=0, met=0.5):
    random = np.random.default_rng(seed)
    features = pd.DataFrame(
        {"a": random.normal(size=n), "noise": random.normal(size=n), "flag": random.integers(2, size=n)}
    )
    chance = 1 / (1 + np.exp(2 - 2 * features["a"].to_numpy() - features["flag"].to_numpy()))
    hits = random.binomial(8, chance) * (random.uniform(size=n) < met)
    misses = np.where(hits > 0, 8 - hits, 8 * (random.uniform(size=n) < met))
    return features, chance, torch.from_numpy(hits).double(), torch.from_numpy(misses).double()


def test_the_prediction_follows_the_features_and_beats_the_mean():
    features, chance, _, _ = known_pool()
    random = np.random.default_rng(1)
    hits = torch.from_numpy(random.binomial(8, chance)).double()
    met = torch.from_numpy(random.uniform(size=len(chance)) < 0.3)
    found = PredictedDifficulty().predict(hits * met, (8 - hits) * met, features)
    assert found.features == ("a", "noise", "flag")
    assert found.notes == ()
    assert np.corrcoef(found.mean, chance)[0, 1] > 0.95
    unmet = ~met.numpy()
    figures = calibration(found.mean.numpy()[unmet], hits.numpy()[unmet], 8 - hits.numpy()[unmet])
    assert figures.brier < 0.9 * figures.brier_of_mean


def test_a_samples_own_outcomes_do_not_move_its_prediction():
    features, _, hits, misses = known_pool(n=200)
    before = PredictedDifficulty().predict(hits, misses, features).mean
    for row in torch.nonzero(hits + misses)[:20, 0].tolist():
        other_hits, other_misses = hits.clone(), misses.clone()
        other_hits[row], other_misses[row] = misses[row], hits[row]
        after = PredictedDifficulty().predict(other_hits, other_misses, features).mean
        assert after[row] == before[row]
        assert int((after != before).sum()) > 100


def test_the_embedding_is_a_feature():
    random = np.random.default_rng(0)
    embedding = torch.from_numpy(random.normal(size=(600, 20)) * ([5.0] + [0.1] * 19)).float()
    hits = torch.where(embedding[:, 0] > 0, 8.0, 0.0).double()
    known = torch.arange(600) % 10 > 0
    found = PredictedDifficulty().predict(hits, 8 - hits, None, embedding, known)
    assert found.features == ("embedding",)
    right = (found.mean > 0.5) == (hits > 4)
    assert float(right[known].double().mean()) > 0.95
    assert float(found.mean[~known].std()) < 0.2


def test_before_the_first_outcome_it_is_the_given_mean():
    features, *_ = known_pool(n=50)
    none = torch.zeros(50, dtype=torch.float64)
    found = PredictedDifficulty(prior_mean=0.125).predict(none, none, features)
    assert found.mean.tolist() == [0.125] * 50
    assert found.notes == ()


@pytest.mark.parametrize(("hit", "kind"), [(0.0, "misses"), (8.0, "hits")])
def test_one_class_of_outcomes_predicts_the_mean_and_says_so(hit, kind):
    features, *_ = known_pool(n=50)
    hits, misses = torch.zeros(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    hits[:10], misses[:10] = hit, 8 - hit
    found = PredictedDifficulty(folds=2).predict(hits, misses, features)
    assert [note.partition(",")[0] for note in found.notes] == [f"all rollouts of the 10 samples met so far are {kind}"]
    assert len(set(found.mean.tolist())) <= 2
    assert bool(((found.mean > 0.9) if hit else (found.mean < 0.1)).all())


@pytest.mark.parametrize("kappa", [4.0, 20.0, 100.0])
def test_the_strength_is_that_of_the_pool(kappa):
    random = np.random.default_rng(0)
    chance = random.beta(0.2 * kappa, 0.8 * kappa, size=20_000)
    hits = torch.from_numpy(random.binomial(16, chance)).double()
    hits[10_000:] = 0
    misses = torch.where(torch.arange(20_000) < 10_000, 16.0 - hits, 0.0).double()
    assert PredictedDifficulty().predict(hits, misses).strength == pytest.approx(kappa, rel=0.15)
    assert PredictedDifficulty(strength=7).predict(hits, misses).strength == 7
    none = torch.zeros(5, dtype=torch.float64)
    assert PredictedDifficulty().predict(none, none).strength == 2.0
    assert PredictedDifficulty().predict(none + 1, none).strength == 256.0


@pytest.mark.parametrize(("group", "times"), [(4, 4), (8, 2), (16, 8), (None, 4)])
def test_the_strength_is_that_of_the_pool_however_often_its_samples_were_met(group, times):
    """Rollouts that are counted with a weight tell less by chance; exact probabilities (group None) have no chance."""
    random, n = np.random.default_rng(1), 20_000
    chance = random.beta(0.3 * 20, 0.7 * 20, size=n)
    store = SignalStore(range(n))
    for step in range(times):
        if group is None:
            met = SampleSignals(range(n), solve_probability=chance)
        else:
            met = SampleSignals(range(n), rewards=(random.random((n, group)) < chance[:, None]).astype(float))
        store.update(met, epoch=0, step=step, source="train")
    view = store.pool_view(0)
    found = PredictedDifficulty().predict(view.hits, view.misses, squared_weights=store.squared_weights)
    assert found.strength == pytest.approx(20, rel=0.1)


def test_the_prediction_is_the_fit_of_a_plain_logistic_regression():
    random, n = np.random.default_rng(3), 200
    values = random.normal(size=n)
    values[random.random(n) < 0.1] = np.nan
    hits = random.integers(0, 5, n) * (random.random(n) < 0.7)
    misses = random.integers(0, 9, n) * (random.random(n) < 0.7)
    found = PredictedDifficulty(folds=3, seed=5).predict(
        torch.from_numpy(hits), torch.from_numpy(misses), pd.DataFrame({"a": values})
    )
    knots = np.quantile(values[~np.isnan(values)], [0, 0.2, 0.4, 0.6, 0.8, 1])

    def row(value):
        if math.isnan(value):
            return [1.0, 1.0, *[0.0] * 5]
        ramps = [(value - low) / (high - low) for low, high in pairwise(knots)]
        return [1.0, 0.0, *[min(max(ramp, 0.0), 1.0) for ramp in ramps]]

    basis = np.array([row(value) for value in values])
    fold = np.random.default_rng(5).permutation(n) % 3
    for one in range(3):
        rows = np.flatnonzero((hits + misses > 0) & (fold != one))
        share = hits[rows] / (hits[rows] + misses[rows])

        def loss(weights, rows=rows, share=share):
            scores = basis[rows] @ weights
            return (np.logaddexp(0, scores) - share * scores).sum() + (weights[1:] ** 2).sum() / 2

        scores = basis[fold == one] @ minimize(loss, np.zeros(7), tol=1e-10).x
        np.testing.assert_allclose(found.mean.numpy()[fold == one], 1 / (1 + np.exp(-scores)), atol=5e-4)


def test_few_outcomes_and_a_single_sample():
    one = torch.ones(1, dtype=torch.float64)
    assert PredictedDifficulty(prior_mean=0.3).predict(one, one, pd.DataFrame({"a": [1.0]})).mean.tolist() == [0.3]
    features, _, hits, misses = known_pool(n=40)
    hits[3:], misses[3:] = 0, 0
    hits[0], misses[1] = 4, 4
    found = PredictedDifficulty().predict(hits, misses, features).mean
    assert bool(((found > 0) & (found < 1)).all())


def test_nan_features_count_as_unknown_and_are_named():
    features, _, hits, misses = known_pool(n=300)
    features.loc[:9, "a"] = np.nan
    features.loc[10, "noise"] = np.inf
    features["nothing"] = np.nan
    found = PredictedDifficulty().predict(hits, misses, features)
    assert found.notes == (
        "the feature a is NaN for 10 of 300 samples (and in 2 more columns): they count as unknown; fill the column to "
        "have them predicted by it",
    )
    assert bool(found.mean.isfinite().all())


def test_no_features_give_the_mean_of_the_other_folds():
    hits, misses = torch.tensor([1.0, 0.0, 3.0, 0.0]).double(), torch.tensor([3.0, 4.0, 1.0, 0.0]).double()
    found = PredictedDifficulty(folds=4).predict(hits, misses)
    expected = [(3 + 1) / (8 + 2), (4 + 1) / (8 + 2), (1 + 1) / (8 + 2), (4 + 1) / (12 + 2)]
    assert found.mean.tolist() == pytest.approx(expected)
    assert found.features == ()


def test_a_table_without_users_or_items_says_what_is_left():
    rows = pd.DataFrame({"user_id": ["u", "v", "u"], "item_id": ["a", "a", "b"], "timestamp": [0.0, 86_400.0, 0.0]})
    whole, note = table_features(rows)
    assert note is None
    assert np.allclose(np.expm1(whole), [[2, 2, 1], [2, 1, 0], [1, 2, 1]])
    left, note = table_features(rows.drop(columns="item_id"))
    assert list(left) == ["user_activity", "age"]
    assert note.startswith(
        "the table of samples has no item_id, so the solve probability is predicted from user_activity, age alone"
    )
    none, note = table_features(rows[[]])
    assert none.shape == (3, 0)
    assert note.startswith("the table of samples has no item_id and no user_id and no timestamp, so the solve")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"strength": 0}, "strength is 0: give the number of rollouts that a prediction counts as, above 0"),
        ({"strength": float("inf")}, "strength is inf"),
        ({"strength": 1e308}, r"strength is 1e\+308: .* at most 1e\+09"),
        ({"discount": 1.5}, "discount is 1.5: give a share from 0 to 1"),
        ({"prior_mean": 0.0}, "prior_mean is 0.0: give a probability between 0 and 1"),
        ({"folds": 1}, "folds is 1: give at least 2"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(InputError, match=sentence):
        PredictedDifficulty(**options)


@pytest.mark.parametrize(("scale", "offset"), [(1e308, 0.0), (1e-310, 0.0), (1.0, 1e6), (-1e250, 0.0)])
@pytest.mark.filterwarnings("error")
def test_a_feature_tells_as_much_in_any_unit(scale, offset):
    features, _, hits, misses = known_pool(n=400)
    whole = features[["a"]].clip(-1, 1)
    found = PredictedDifficulty().predict(hits, misses, whole)
    scaled = PredictedDifficulty().predict(hits, misses, (whole + offset) * scale)
    assert scaled.features == ("a",)
    auc = [roc_auc_score((hits > misses)[hits + misses > 0], one.mean[hits + misses > 0]) for one in (found, scaled)]
    assert auc[1] == pytest.approx(auc[0], abs=0.02)


@pytest.mark.parametrize("embedding", [torch.ones(40, 4), torch.zeros(40, 4), torch.zeros(40, 1), torch.ones(40, 0)])
@pytest.mark.filterwarnings("error")
def test_what_is_the_same_for_all_is_no_feature(embedding):
    features, _, hits, misses = known_pool(n=40)
    features["same"] = 0.1
    found = PredictedDifficulty().predict(hits, misses, features, embedding)
    assert found.features == tuple(name for name in features if name != "same")
    alone = PredictedDifficulty().predict(hits, misses, features[["same"]], embedding)
    assert alone.features == ()
    assert torch.equal(alone.mean, PredictedDifficulty().predict(hits, misses).mean)


def test_missing_ids_and_times_are_unknown_and_times_before_1970_count():
    rows = pd.DataFrame(
        {
            "user_id": ["u", None, None, "u"],
            "item_id": [1.0, np.nan, 2.0, 2.0],
            "timestamp": pd.array([-86_400, -2 * 86_400, None, -86_400], dtype="Int64"),
        }
    )
    found, note = table_features(rows)
    assert note is None
    expected = [[1, 2, 0], [np.nan, np.nan, 1], [2, np.nan, np.nan], [2, 2, 0]]
    np.testing.assert_allclose(np.expm1(found.to_numpy()), expected)
    for wrong in (["1998"] * 4, pd.date_range("1998", periods=4)):
        with pytest.raises(InputError, match=r"the column timestamp of the samples holds .*: give unix seconds"):
            table_features(rows.assign(timestamp=wrong))


def test_bad_features():
    none = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(InputError, match="the features have 3 rows for 2 samples"):
        PredictedDifficulty().predict(none, none, pd.DataFrame({"a": [1, 2, 3]}))
    with pytest.raises(InputError, match="the feature a holds"):
        PredictedDifficulty().predict(none, none, pd.DataFrame({"a": ["x", "y"]}))
    with pytest.raises(InputError, match="the feature a holds complex128"):
        PredictedDifficulty().predict(none, none, pd.DataFrame({"a": [1j, 2.0]}))
    for names in (["a", "a"], [0, "0"]):
        with pytest.raises(InputError, match=f"two features are called {names[0]}: give each a name of its own"):
            PredictedDifficulty().predict(none, none, pd.DataFrame([[1, 2], [3, 4]], columns=names))


def test_without_scikit_learn_a_sentence_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("minirec_pl.selection.predicted.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs scikit-learn: pip install 'minirec-pl\[kmeans\]'"):
        PredictedSelector()
