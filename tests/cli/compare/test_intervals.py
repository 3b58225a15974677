"""Intervals against SciPy and plain loops."""

import math

import numpy as np
import pytest
from scipy import stats

from minirec_pl.cli.compare.intervals import paired_interval, t_interval


def test_interval_of_a_mean_is_that_of_scipy():
    values = np.random.default_rng(0).normal(size=7)
    found = t_interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.n == 7


def test_interval_of_one_value_and_of_none_claims_nothing():
    assert t_interval([3.0])[0] == 3.0
    assert math.isnan(t_interval([3.0]).low)
    assert t_interval([float("nan")]).n == 0


def test_paired_interval_is_that_of_the_paired_test():
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=6), rng.normal(size=6)
    found = paired_interval(one, other)
    low, high = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
