"""Predicted difficulty: the solve probability of every sample, met or not, from the outcomes that training met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from minirec_pl.utils.errors import InputError, check_whole
from minirec_pl.utils.seeds import check_seed

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
_MOST_MET = 100_000  # samples that a model is fitted on, those met last
_ROWS = 65_536  # samples predicted at a time
_KNOTS = 6  # quantiles between which the effect of a feature is linear
_COMPONENTS = 8  # principal components of the embeddings
_LOWEST = 1e-4  # predicted probability, and 1 less it the highest
_UNIFORM = 2.0  # strength before the first outcome; with a mean of 0.5 that is Beta(1, 1)
_WEAKEST, _STRONGEST = 2.0, 256.0
_MOST_STRENGTH = 1e9  # that one may give
_HUGE = 1e307  # two values of a feature that is larger may be further apart than the largest float
_NEEDS = {"log_popularity": "item_id", "user_activity": "user_id", "age": "timestamp"}


@dataclass(frozen=True)
class Prediction:
    """The solve probabilities that a model predicts for a pool.

    Attributes:
        mean: [N] float64 in (0, 1), out of fold.
        strength: rollouts that a prediction counts as.
        features: names of what tells samples apart; empty where all samples get the same.
        notes: sentences on what is missing, for a warning.
    """

    mean: Tensor
    strength: float
    features: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class PredictedDifficulty:
    """Predicts the solve probability of every sample, with a Beta posterior per sample, and needs no scoring (ours).

    The prior of sample i is Beta(kappa p_i, kappa (1 - p_i)). p_i is predicted by a logistic regression on features of
    the samples, fitted to the share of hits of those that training met, each with the same weight. Once a sample is
    met, its outcomes update the posterior with a discount (MoPPS, arXiv 2507.04632, section 3.2):
    alpha <- lambda alpha + (1 - lambda) alpha_0 + hits, beta <- lambda beta + (1 - lambda) beta_0 + misses. That is
    alpha_0 plus hits that are discounted alike, which is how `SignalStore.posterior` keeps it while the prior is
    refitted before every selection.

    kappa, the rollouts that a prediction counts as, is by default taken from the outcomes as well, by the method of
    moments: the less the hits of samples vary about their predictions, the larger it is, from 2 to 256.

    p_i is always out of fold: the samples are dealt out into folds, and the model of a fold is fitted without its
    samples, so a sample's own hits count once. The features need no language model. Each enters as a piecewise linear
    function between six quantiles of the pool; a missing value has an effect of its own. Embeddings, where there are
    some, else the item factors that `RecDataModule` gives, enter as their first 8 principal components. The model is
    fitted on at most 100,000 samples, those met last.

    Where nothing was met yet, p_i is `prior_mean`. Where all outcomes are hits or all are misses, or there are no
    features, it is the share of hits in the other folds, with one hit and one miss added.
    """

    def __init__(
        self,
        strength: float | None = None,
        discount: float = 0.5,
        prior_mean: float = 0.5,
        folds: int = 5,
        seed: int = 42,
    ) -> None:
        """Sets the model.

        Args:
            strength: Rollouts that a prediction counts as, kappa, above 0 and at most 1e9; None takes it from the
                outcomes.
            discount: Share lambda of the earlier counts that remains when a sample is met again, from 0 to 1. Published
                are 1 and, for fast learners, 0.5.
            prior_mean: Solve probability before the first outcome, between 0 and 1.
            folds: Number of folds, at least 2.
            seed: Seed of the folds and of the principal components.

        Raises:
            InputError: If an option is out of range, or scikit-learn is not installed.
        """
        if strength is not None and not 0 < strength <= _MOST_STRENGTH:
            raise InputError(
                f"strength is {strength}: give the number of rollouts that a prediction counts as, above 0 and at most "
                f"{_MOST_STRENGTH:g}"
            )
        if not 0 <= discount <= 1:
            raise InputError(f"discount is {discount}: give a share from 0 to 1")
        if not 0 < prior_mean < 1:
            raise InputError(f"prior_mean is {prior_mean}: give a probability between 0 and 1")
        check_whole(folds=folds)
        if folds < 2:
            raise InputError(f"folds is {folds}: give at least 2, so that each is predicted from the others")
        if find_spec("sklearn") is None:
            raise InputError("PredictedDifficulty needs scikit-learn: pip install 'minirec-pl[kmeans]'")
        self.strength = None if strength is None else float(strength)
        self.discount = float(discount)
        self.prior_mean = float(prior_mean)
        self.folds = folds
        self.seed = check_seed(seed)

    def predict(
        self,
        hits: Tensor,
        misses: Tensor,
        features: pd.DataFrame | None = None,
        embedding: Tensor | None = None,
        embedding_known: Tensor | None = None,
        met_at: Tensor | None = None,
        squared_weights: Tensor | None = None,
    ) -> Prediction:
        """Fits the model to the outcomes and predicts every sample, out of fold.

        Args:
            hits: [N] float64, rollouts met that hit; 0 of samples that were not met.
            misses: [N] float64, the others.
            features: [N] rows of numbers, a column per feature; NaN for an unknown value. None for none.
            embedding: [N, E] float, or None.
            embedding_known: [N] bool, None for all.
            met_at: [N] int64, when each sample was last met, for pools of which more were met than the model is fitted
                on; None for the order of the rows.
            squared_weights: [N] float64, sum of the squared weights with which a sample's rollouts are counted, see
                `SignalStore.squared_weights`; None where each counts once.

        Raises:
            InputError: If `features` has another number of rows, a column that is not numeric, or two of one name.
        """
        notes: list[str] = []
        hit, miss = (value.double().numpy() for value in (hits, misses))
        n, met = len(hit), np.flatnonzero(hit + miss)
        columns, names = self._columns(n, features, embedding, embedding_known, met, notes)
        if not len(met):
            start = torch.full((n,), self.prior_mean, dtype=torch.float64)
            return Prediction(start, self.strength or _UNIFORM, (), tuple(notes))
        total = float(hit.sum()), float(miss.sum())
        if not min(total):
            kind = "hits" if total[0] else "misses"
            notes.append(
                f"all rollouts of the {len(met)} samples met so far are {kind}, so no feature tells samples apart "
                "and their mean is predicted for all: train on, or check the reward"
            )
            columns = []
        if met_at is not None:
            met = met[np.argsort(-met_at.numpy()[met], kind="stable")]
        met = np.sort(met[:_MOST_MET])
        fold = np.random.default_rng(self.seed).permutation(n) % self.folds
        models = [self._fit(columns, met[fold[met] != one], hit, miss) for one in range(self.folds)]
        mean = np.empty(n)
        for first in range(0, n, _ROWS):
            rows = np.arange(first, min(n, first + _ROWS))
            basis = _basis(columns, rows)
            for one, model in enumerate(models):
                own = fold[rows] == one
                mean[rows[own]] = model.predict(basis[own])
        mean = mean.clip(_LOWEST, 1 - _LOWEST)
        squares = (hits + misses if squared_weights is None else squared_weights).double().numpy()
        strength = self.strength or _strength(mean[met], hit[met], miss[met], squares[met])
        return Prediction(torch.from_numpy(mean), strength, tuple(names) if columns else (), tuple(notes))

    def _fit(self, columns: Sequence[_Column], rows: Ints, hits: Floats, misses: Floats) -> _Model:
        """Fits a model to the outcomes of these rows."""
        hit, miss = hits[rows], misses[rows]
        total = float(hit.sum()), float(miss.sum())
        mean = (total[0] + 1) / (sum(total) + 2) if len(rows) else self.prior_mean
        if not columns or not min(total):
            return _Model(mean)
        from sklearn.linear_model import LogisticRegression

        basis, size = _basis(columns, rows), hit + miss
        outcome, weight = np.repeat([1, 0], len(rows)), np.concatenate([hit / size, miss / size])
        used = weight > 0
        regression = LogisticRegression(solver="newton-cholesky")
        return _Model(mean, regression.fit(np.tile(basis, (2, 1))[used], outcome[used], sample_weight=weight[used]))

    def _columns(
        self,
        n: int,
        features: pd.DataFrame | None,
        embedding: Tensor | None,
        known: Tensor | None,
        met: Ints,
        notes: list[str],
    ) -> tuple[list[_Column], list[str]]:
        """The features that tell samples apart, and the names of what they are from."""
        table = {} if features is None else _numbers(features, n)
        unknown = {name: int(np.isnan(values).sum()) for name, values in table.items()}
        if missing := {name: count for name, count in unknown.items() if count}:
            first, count = next(iter(missing.items()))
            more = f" (and in {len(missing) - 1} more columns)" if len(missing) > 1 else ""
            notes.append(
                f"the feature {first} is NaN for {count} of {n} samples{more}: they count as unknown; fill the column "
                "to have them predicted by it"
            )
        parts = {name: list(_Column.of(values)) for name, values in table.items()}
        if embedding is not None:
            components = _components(embedding, known, met, self.seed)
            parts["embedding"] = [column for values in components for column in _Column.of(values)]
        return [column for part in parts.values() for column in part], [name for name, part in parts.items() if part]


def table_features(samples: pd.DataFrame) -> tuple[pd.DataFrame, str | None]:
    """Makes features out of a table of samples: how popular a target is, how active a user, how old a sample.

    Args:
        samples: [N] rows; `item_id`, `user_id` and `timestamp` (unix seconds) are used where they are there.

    Returns:
        A frame of N rows with the columns `log_popularity`, `user_activity` and `age` (log of days), as far as they can
        be computed, NaN where an id or a time is missing; and a sentence on what is missing, None where nothing is.

    Raises:
        InputError: If the timestamps are not numbers.
    """
    found: dict[str, Floats] = {}
    for name, source in _NEEDS.items():
        if source not in samples:
            continue
        if source == "timestamp":
            found[name] = _log_age(samples[source])
        else:
            codes, _ = pd.factorize(samples[source])
            found[name] = np.where(codes < 0, np.nan, np.log1p(np.bincount(codes + 1)[codes + 1].astype(np.float64)))
    lacking = [source for source in _NEEDS.values() if source not in samples]
    left = f"from {', '.join(found)} alone" if found else "without features, so the same for all that were never met"
    note = None
    if lacking:
        note = (
            f"the table of samples has no {' and no '.join(lacking)}, so the solve probability is predicted {left}: "
            "add the column, or define sample_features(sample_ids) on the DataModule"
        )
    return pd.DataFrame(found, index=range(len(samples))), note


def _log_age(timestamps: pd.Series[Any]) -> Floats:
    if not pd.api.types.is_numeric_dtype(timestamps):
        raise InputError(f"the column timestamp of the samples holds {timestamps.dtype}: give unix seconds")
    seconds = _finite(timestamps)
    age: Floats = np.log1p((np.nanmax(seconds, initial=-np.inf) - seconds) / 86_400)
    return age


def _finite(column: pd.Series[Any]) -> Floats:
    """The numbers of a column, NaN where one is missing or infinite."""
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def _strength(mean: Floats, hits: Floats, misses: Floats, squares: Floats) -> float:
    """Takes kappa by the method of moments: hits vary about the prediction as those of a beta-binomial distribution do.

    E (h - n p)^2 = p (1 - p) (m + (n^2 - m) rho) with rho = 1 / (kappa + 1), n the sum of the weights with which a
    sample's rollouts are counted and m that of their squares; without weights m = n.
    """
    size, each = hits + misses, mean * (1 - mean)
    together = float(((size**2 - squares) * each).sum())
    rho = float(((hits - size * mean) ** 2 - squares * each).sum()) / together if together > 0 else 0.0
    return float(np.clip(1 / rho - 1, _WEAKEST, _STRONGEST)) if rho > 0 else _STRONGEST


def _numbers(features: pd.DataFrame, n: int) -> dict[str, Floats]:
    if len(features) != n:
        raise InputError(f"the features have {len(features)} rows for {n} samples: give one per sample, in their order")
    found: dict[str, Floats] = {}
    for place, name in enumerate(map(str, features.columns)):
        column = features.iloc[:, place]
        if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_complex_dtype(column):
            raise InputError(f"the feature {name} holds {column.dtype}, not numbers: encode it or leave it out")
        if name in found:
            raise InputError(f"two features are called {name}: give each a name of its own")
        values = _finite(column)
        found[name] = values / 64 if np.nanmax(np.abs(values), initial=0.0) > _HUGE else values
    return found


def _components(embedding: Tensor, known: Tensor | None, met: Ints, seed: int) -> Iterator[Floats]:
    """Principal components of the embeddings, found on the samples met, NaN where no embedding is known."""
    from sklearn.decomposition import PCA

    rows = np.arange(len(embedding)) if known is None else known.numpy().nonzero()[0]
    learned = np.intersect1d(met, rows)[:_ROWS] if len(np.intersect1d(met, rows)) > 1 else rows[:_ROWS]
    width = min(_COMPONENTS, len(learned), embedding.shape[1])
    if width < 1 or len(learned) < 2:
        return
    with np.errstate(invalid="ignore", over="ignore"):  # in shares of the variance, which are not used
        known_values = embedding[torch.from_numpy(learned)].float().numpy()
        found = PCA(width, svd_solver="full", random_state=seed).fit(known_values)
    values = np.full((len(embedding), width), np.nan)
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS]
        values[block] = found.transform(embedding[torch.from_numpy(block)].float().numpy())
    yield from values.T


@dataclass(frozen=True)
class _Column:
    """A ramp from 0 to 1 between two quantiles of a feature, or 1 where the feature is unknown."""

    values: Floats
    low: float
    high: float

    @classmethod
    def of(cls, values: Floats) -> Iterator[_Column]:
        """The columns of a feature; none of one that is the same for all."""
        unknown = np.isnan(values)
        known = values[~unknown]
        if unknown.any() and len(known):
            yield cls(values, np.nan, np.nan)
        knots = np.unique(np.quantile(known, np.linspace(0, 1, _KNOTS))) if len(known) else known
        for low, high in pairwise(knots):
            yield cls(values, float(low), float(high))

    def at(self, rows: Ints) -> Floats:
        values = self.values[rows]
        if np.isnan(self.low):
            return np.isnan(values).astype(np.float64)
        ramp: Floats = ((values - self.low) / (self.high - self.low)).clip(0, 1)
        return np.nan_to_num(ramp, nan=0.0)


def _basis(columns: Sequence[_Column], rows: Ints) -> Floats:
    basis = np.empty((len(rows), len(columns)))
    for place, column in enumerate(columns):
        basis[:, place] = column.at(rows)
    return basis


@dataclass(frozen=True)
class _Model:
    """A logistic regression on the basis, or one probability for all."""

    mean: float
    regression: Any = None

    def predict(self, basis: Floats) -> Floats:
        if self.regression is None or not len(basis):
            return np.full(len(basis), self.mean)
        chance: Floats = self.regression.predict_proba(basis)[:, 1]
        return chance
