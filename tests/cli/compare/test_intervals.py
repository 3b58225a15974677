"""Intervals against SciPy and plain loops."""

import math

import numpy as np
import pytest
from scipy import stats

from minirec_pl.cli.compare.intervals import paired_interval, quality_at, t_interval, user_bootstrap


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


def test_bootstrap_draws_whole_users():
    rng = np.random.default_rng(2)
    users = rng.integers(0, 9, 80)
    values, reference = rng.random((3, 80)), rng.random((3, 80))
    found = user_bootstrap(values, reference, users, draws=500, seed=5)
    draws = np.random.default_rng(5).multinomial(9, np.full(9, 1 / 9), size=500)
    plain = []
    for times in draws:
        rows = [row for user in range(9) for _ in range(times[user]) for row in np.flatnonzero(users == user)]
        plain.append(np.mean([values[seed][row] - reference[seed][row] for row in rows for seed in range(3)]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), rel=1e-9)
    assert found.mean == pytest.approx((values - reference).mean())
    assert found.n == 9


def test_bootstrap_of_users_with_one_sample_each_is_near_students_interval():
    rng = np.random.default_rng(3)
    values = rng.normal(0.2, 1, 400)
    found = user_bootstrap(values, np.zeros(400), np.arange(400), draws=4000)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_quality_at_a_cost_is_linear_between_points_and_nothing_outside():
    cost, quality = np.array([100.0, 200.0, 400.0]), np.array([0.1, 0.3, 0.2])
    found = quality_at(cost, quality, [100, 150, 300, 400, 99, 401])
    assert found[:4] == pytest.approx([0.1, 0.2, 0.25, 0.2])
    assert np.isnan(found[4:]).all()
