"""What is known of samples without a language model: features and vectors out of who had which items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from minirec_pl.data.samples import FloatArray, IntArray, SampleTable

_FACTORS = 16
_LAST = 10  # items of a history that its vector is the mean of
_SECONDS_A_DAY = 86_400
_PAIRS = 2e8  # of items of one user, counted at most
_DENSE = 2**24  # counts of co-occurrence held at a time


@dataclass(frozen=True)
class SampleFeatures:
    """Features of samples.

    Attributes:
        table: [n] rows: `log_popularity` of the target, `similarity` of target and history (cosine of their factors),
            `cooccurrence` and `best_cooccurrence` (cosine of who had the target and who had an item of the history,
            mean and largest over its last 10), `history_length` (log of items), `age` (log of days until the last
            sample), `user_activity` (log of interactions) and `cold` (1 where nobody had the target).
        vectors: float32 [n, 2 D], unit factors of the target and of the last 10 items of the history, side by side; 0
            where nobody had them.
    """

    table: pd.DataFrame
    vectors: npt.NDArray[np.float32]


def sample_features(table: SampleTable, sample_ids: IntArray, known: IntArray, train: IntArray) -> SampleFeatures:
    """Computes the features of samples.

    Args:
        table: that they are from.
        sample_ids: [n].
        known: rows whose targets count for popularity, cold targets and factors: what the policy was warmed up on.
        train: rows that count for the activity of users.
    """
    popularity = table.item_counts(known).astype(np.float64)
    log = _distinct(table.interactions(known), table.n_items)
    factors = _unit(_item_factors(*log, table.n_items))
    mean, best = _cooccurrence(table, sample_ids, *log)
    target, history = factors[table.item[sample_ids]], _unit(_history_means(table, sample_ids, factors))
    seconds = table.timestamp[sample_ids]
    activity = np.bincount(table.user[train], minlength=len(table.user_ids))
    columns = {
        "log_popularity": np.log1p(popularity[table.item[sample_ids]]),
        "similarity": (target * history).sum(axis=1),
        "cooccurrence": mean,
        "best_cooccurrence": best,
        "history_length": np.log1p(table.n_earlier[sample_ids]),
        "age": np.log1p((seconds.max(initial=-np.inf) - seconds) / _SECONDS_A_DAY),
        "user_activity": np.log1p(activity[table.user[sample_ids]]),
        "cold": (popularity[table.item[sample_ids]] == 0).astype(np.float64),
    }
    return SampleFeatures(pd.DataFrame(columns), np.hstack([target, history]).astype(np.float32))


def _distinct(interactions: IntArray, n_items: int) -> tuple[IntArray, IntArray]:
    """Who had which item, each once: user [m], from 0 without gaps, and item [m]."""
    own_user, item = np.divmod(np.unique(interactions[:, 0] * n_items + interactions[:, 1]), n_items)
    return np.unique(own_user, return_inverse=True)[1], item


def _cooccurrence(
    table: SampleTable, sample_ids: IntArray, user: IntArray, item: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Cosines of who had the target and who had each of the last items of its history: mean and largest, [n] each.

    Counted among users drawn at random, as many as together have `_PAIRS` pairs of items.
    """
    from scipy.sparse import csc_array

    mean, best = np.zeros(len(sample_ids)), np.zeros(len(sample_ids))
    if not len(user):
        return mean, best
    pairs = np.bincount(user).astype(np.float64) ** 2
    order = np.random.default_rng(0).permutation(len(pairs))
    drawn = np.zeros(len(pairs), dtype=np.bool_)
    drawn[order[: max(1, int((pairs[order].cumsum() <= _PAIRS).sum()))]] = True
    used = drawn[user]
    had = csc_array((np.ones(used.sum(), np.float32), (user[used], item[used])), shape=(len(pairs), table.n_items))
    norm = np.sqrt(np.bincount(item[used], minlength=table.n_items)).clip(1)

    end = table.history_end[sample_ids]
    length = np.minimum(end - table.history_begin[sample_ids], _LAST)
    by_target = np.argsort(table.item[sample_ids], kind="stable")
    targets, starts = np.unique(table.item[sample_ids][by_target], return_index=True)
    step = max(1, _DENSE // table.n_items)
    for first in range(0, len(targets), step):
        some = targets[first : first + step]
        together = (had[:, some].T @ had).toarray() / (norm[some, None] * norm)
        stop = starts[first + step] if first + step < len(starts) else len(by_target)
        rows = by_target[starts[first] : stop]
        target = np.searchsorted(some, table.item[sample_ids[rows]])
        for back in range(1, _LAST + 1):
            inside = length[rows] >= back
            cosine = together[target[inside], table.grouped_item[end[rows[inside]] - back]]
            mean[rows[inside]] += cosine / length[rows[inside]]
            best[rows[inside]] = np.maximum(best[rows[inside]], cosine)
    return mean, best


def _item_factors(user: IntArray, item: IntArray, n_items: int) -> FloatArray:
    """Factors of items by who had them, [n_items, D]: a truncated SVD of the users x items matrix, scaled both ways."""
    n_users = int(user.max(initial=-1)) + 1
    width = min(_FACTORS, n_users - 1, len(np.unique(item)) - 1)
    if width < 1:
        return np.zeros((n_items, 1))
    from scipy.sparse import csr_array
    from sklearn.decomposition import TruncatedSVD

    values = 1 / np.sqrt(np.bincount(user)[user] * np.bincount(item, minlength=n_items)[item])
    matrix = csr_array((values, (user, item)), shape=(n_users, n_items))
    with np.errstate(invalid="ignore"):  # in shares of the variance, which are not used
        found = TruncatedSVD(width, random_state=0).fit(matrix)
    factors: FloatArray = (found.components_ * found.singular_values_[:, None]).T
    return factors


def _history_means(table: SampleTable, sample_ids: IntArray, factors: FloatArray) -> FloatArray:
    """Mean factors of the last items of each history, [n, D]."""
    end = table.history_end[sample_ids]
    begin = np.maximum(table.history_begin[sample_ids], end - _LAST)
    means = np.empty((len(sample_ids), factors.shape[1]))
    for column in range(factors.shape[1]):
        total = np.concatenate([[0.0], np.cumsum(factors[table.grouped_item, column])])
        means[:, column] = (total[end] - total[begin]) / np.maximum(end - begin, 1)
    return means


def _unit(vectors: FloatArray) -> FloatArray:
    """Rows of length 1; those that are shorter than rounding are 0."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: FloatArray = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-9)
    return unit
