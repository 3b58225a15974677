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
