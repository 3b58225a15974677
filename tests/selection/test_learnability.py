import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.selection import group_difficulty, learnability
from minirec_pl.selection.learnability import min_max, quantile_calibration
from minirec_pl.utils.errors import InputError


def gaussian(rewards: list[float], mu: float, sigma: float | None) -> list[float]:
    mean = math.fsum(rewards) / len(rewards)
    if sigma is None:
        sigma = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [math.exp(-((r - mu) ** 2) / (2 * sigma**2)) for r in rewards]


def scaled(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(v - low) / (high - low) for v in values]


rewards_lists = st.lists(st.floats(0, 1).map(lambda r: round(r, 6)), min_size=2, max_size=30)


@given(rewards_lists.filter(lambda r: max(r) - min(r) > 0.01), st.floats(0, 1), st.none() | st.floats(0.2, 2))
@settings(deadline=None)
def test_equals_the_formula(rewards, mu, sigma):
    expected = gaussian(rewards, mu, sigma)
    got = learnability(np.array(rewards), mu=mu, sigma=sigma, normalize=False)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=0)
    if max(expected) - min(expected) > 1e-6:
        np.testing.assert_allclose(learnability(np.array(rewards), mu=mu, sigma=sigma), scaled(expected), atol=1e-9)


def test_published_column(published):
    np.testing.assert_allclose(learnability(published["rewards"]), published["learnability"], rtol=0, atol=1e-9)


def test_published_first_pick(published):
    score = learnability(published["rewards"]).numpy() + published["representativeness"]
    assert published["sample_id"][score.argmax()] == 1925 == published["selected_256"][0]


def test_groups_are_averaged():
    group = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert torch.equal(learnability(group), learnability(torch.tensor([0.5, 1.0, 0.0])))
    assert learnability(group).dtype == torch.float64


@pytest.mark.parametrize("rewards", [[0.3] * 7, [0.0] * 4, [1.0], [[0.1, 0.1, 0.1], [0.1 + 1e-17, 0.1, 0.1]]])
def test_constant_rewards_say_nothing(rewards):
    r = torch.tensor(rewards, dtype=torch.float64)
    assert learnability(r).tolist() == [0.5] * len(r)
    assert learnability(r, normalize=False).tolist() == [1.0] * len(r)


def test_rewards_far_below_mu_still_rank():
    far = learnability(torch.tensor([0.0, 0.001, 0.002]), sigma=1e-3)
    assert far[2] == 1
    assert far[0] == 0
    assert 0 < far[1] < 1e-100  # exp(-125000) alone would have been 0 for all three


@pytest.mark.parametrize("sigma", [1e-9, 1e-200])
def test_a_tiny_sigma_leaves_the_nearest_to_mu(sigma):
    rewards = torch.tensor([0.0, 1.0, 0.4, 0.6], dtype=torch.float64)
    assert learnability(rewards, mu=0.41, sigma=sigma).tolist() == [0, 0, 1, 0]
    assert learnability(rewards, mu=0.4, sigma=sigma, normalize=False).tolist() == [0, 0, 1, 0]


def test_rewards_that_differ_by_less_than_rounding_say_nothing():
    assert learnability(torch.tensor([1e-200, 2e-200], dtype=torch.float64)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "rewards",
    [
        np.array([0, 1, 1, 0, 1]),
        np.array([False, True, True, False, True]),
        torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float16),
        torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], requires_grad=True),
    ],
    ids=["int", "bool", "half", "with gradient"],
)
def test_any_number_type_is_computed_in_double(rewards):
    expected = learnability(np.array([0.0, 1.0, 1.0, 0.0, 1.0]), mu=0.2)
    got = learnability(rewards, mu=0.2)
    assert torch.equal(got, expected)
    assert not got.requires_grad


def test_ties_stay_ties():
    values = learnability(np.array([0.2, 0.8, 0.2, 0.5, 0.8])).tolist()
    assert values[0] == values[2]
    assert values[1] == values[4]


def test_empty_pool_has_no_learnability():
    assert learnability(torch.zeros(0)).tolist() == []
    assert learnability(torch.zeros(0, 4)).tolist() == []


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([0.1, math.nan], {}, "row 1"),
        ([[0.1, 0.2], [math.inf, 0.1]], {}, "row 1"),
        ([0.1, 0.2], {"sigma": 0.0}, "sigma is .*: give a number above 0"),
        ([0.1, 0.2], {"sigma": math.nan}, "sigma is .*: give a number above 0"),
        ([0.1, 0.2], {"mu": math.nan}, "mu is nan: give a finite number"),
        ([[[0.1]]], {}, "shape"),
    ],
)
def test_bad_input(rewards, options, message):
    with pytest.raises(InputError, match=message):
        learnability(torch.tensor(rewards), **options)


@given(st.fractions(0, 1), st.integers(1, 64))
@settings(deadline=None)
def test_group_difficulty_equals_exact_arithmetic(p, group):
    p = Fraction(float(p))
    exact = float(1 - (1 - p) ** group)
    assert float(group_difficulty(torch.tensor([float(p)], dtype=torch.float64), group)) == pytest.approx(
        exact, rel=1e-12
    )


def test_group_difficulty_keeps_tiny_probabilities_and_the_ends():
    q = group_difficulty(torch.tensor([0.0, 1e-18, 1.0, math.nan], dtype=torch.float64), 16)
    assert q[:3].tolist() == [0.0, pytest.approx(1.6e-17, rel=1e-12), 1.0]
    assert q[3].isnan()


@pytest.mark.parametrize(("p", "group"), [(1.1, 4), (-0.1, 4), (0.5, 0)])
def test_group_difficulty_bad_input(p, group):
    with pytest.raises(InputError):
        group_difficulty(torch.tensor([p]), group)


def test_quantile_calibration_ignores_what_the_gate_removes():
    inside = np.random.default_rng(0).uniform(0.1, 0.3, 101)
    pool = np.concatenate([np.zeros(500), inside, np.ones(300)])
    mu, sigma = quantile_calibration(pool, (0.05, 0.95))
    assert mu == pytest.approx(np.median(inside))
    assert sigma == pytest.approx((np.quantile(inside, 0.75) - np.quantile(inside, 0.25)) / 1.349, rel=1e-4)


def test_quantile_calibration_without_spread_or_rows():
    assert quantile_calibration(np.array([0.0, 0.2, 0.2, 1.0]), (0.05, 0.95)) == (pytest.approx(0.2), None)
    mu, sigma = quantile_calibration(np.array([0.2, 0.2, 0.2, 0.2, 0.2, 0.9]), (0.05, 0.95))
    assert mu == pytest.approx(0.2)
    assert sigma == pytest.approx(np.std([0.2] * 5 + [0.9]))
    with pytest.raises(InputError, match="widen the gate"):
        quantile_calibration(np.zeros(3), (0.05, 0.95))


def test_min_max_of_equal_values_is_neutral():
    assert min_max(torch.tensor([3.0, 3.0], dtype=torch.float64)).tolist() == [0.5, 0.5]
    assert min_max(torch.tensor([1e-9, 3e-9, 2e-9], dtype=torch.float64)).tolist() == pytest.approx([0, 1, 0.5])
