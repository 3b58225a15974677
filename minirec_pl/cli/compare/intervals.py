"""Intervals and comparisons of runs: pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minirec_pl.utils.errors import InputError

Array = npt.NDArray[np.float64]
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and its interval.

    Attributes:
        mean: of what there is.
        low: lower end; NaN where one value leaves nothing to estimate it from.
        high: upper end.
        n: values it rests on.
    """

    mean: float
    low: float
    high: float
    n: int


def t_interval(values: Sequence[float] | Array, level: float = LEVEL) -> Interval:
    """Computes the mean of independent values with Student's interval, m ± t_{n-1} s / sqrt(n).

    Args:
        values: [n], for example of n seeds; NaN are left out.
        level: of the interval.

    Raises:
        InputError: if SciPy is not installed.

    Example:
        >>> t_interval([1.0, 2.0, 3.0]).mean
        2.0
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    nan = float("nan")
    if len(x) == 0:
        return Interval(nan, nan, nan, 0)
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, nan, nan, 1)
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise InputError("intervals over seeds need SciPy: pip install 'minirec-pl[compare]'") from error
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * stats.sem(x))
    return Interval(mean, mean - half, mean + half, len(x))


def paired_interval(values: Sequence[float] | Array, reference: Sequence[float] | Array) -> Interval:
    """Computes the `t_interval` of the differences of values and reference, [n] each, paired by position (seed)."""
    return t_interval(np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64))


def user_bootstrap(
    values: Array,
    reference: Array,
    users: npt.NDArray[np.integer],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Computes the difference of two means over samples, with the percentile interval of drawing users anew.

    A user's samples are not independent, so users are drawn with replacement, each with all samples, and the mean over
    samples is taken again. Values of several seeds are averaged first: their samples and users are the same.

    Args:
        values: gains, [n] or [seeds, n].
        reference: gains of the same samples, of the same shape.
        users: [n], the user of each sample.
        draws: of the bootstrap.
        seed: of the draws.
        level: of the interval.

    Returns:
        The difference, its interval, and the number of users.
    """
    difference = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    if difference.ndim == 2:
        difference = difference.mean(axis=0)
    user, n_users = np.unique(users, return_inverse=True)[1], len(np.unique(users))
    sums = np.bincount(user, weights=difference, minlength=n_users)
    counts = np.bincount(user, minlength=n_users)
    weights = np.random.default_rng(seed).multinomial(n_users, np.full(n_users, 1 / n_users), size=draws)
    drawn = (weights @ sums) / (weights @ counts)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.mean()), float(low), float(high), n_users)


def quality_at(cost: Array, quality: Array, budgets: Sequence[float] | Array) -> Array:
    """Interpolates the quality of a run when it had spent a budget, linearly between its evaluation points; else NaN.

    Args:
        cost: tokens or seconds at each evaluation point, [p], never decreasing.
        quality: at each, [p].
        budgets: [b].

    Returns:
        [b].

    Example:
        >>> quality_at(np.array([0.0, 10.0]), np.array([0.0, 1.0]), [5.0, 11.0]).tolist()
        [0.5, nan]
    """
    return np.interp(budgets, cost, quality, left=np.nan, right=np.nan)
