import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.selection import representativeness
from minirec_pl.utils.errors import InputError


def oracle(gradients: list[list[float]], fresh: list[bool] | None = None) -> list[float]:
    rows = [u for u, f in zip(gradients, fresh or [True] * len(gradients), strict=True) if f and any(u)]
    mean = [math.fsum(column) / max(len(rows), 1) for column in zip(*rows, strict=True)] or [0.0] * len(gradients[0])
    values = []
    for u in gradients:
        norms = math.hypot(*u) * math.hypot(*mean)
        cosine = math.fsum(a * b for a, b in zip(u, mean, strict=True)) / norms if norms else 0.0
        values.append((1 + cosine) / 2)
    return values


vectors = st.lists(st.integers(-3, 3).map(float), min_size=3, max_size=3)


@given(st.lists(st.tuples(vectors, st.booleans()), min_size=1, max_size=12))
@settings(deadline=None)
def test_equals_the_formula(rows):
    gradients, fresh = [u for u, _ in rows], [f for _, f in rows]
    got = representativeness(torch.tensor(gradients), fresh=torch.tensor(fresh), normalize=False)
    np.testing.assert_allclose(got, oracle(gradients, fresh), atol=1e-12)
    np.testing.assert_allclose(representativeness(np.array(gradients), normalize=False), oracle(gradients), atol=1e-12)


def test_normalised_to_the_unit_interval():
    gradients = np.random.default_rng(0).normal(size=(40, 5))
    values = np.array(oracle(gradients.tolist()))
    expected = (values - values.min()) / (values.max() - values.min())
    np.testing.assert_allclose(representativeness(gradients), expected, atol=1e-12)


def test_zero_gradient_is_neutral_before_scaling_and_out_of_the_mean():
    gradients = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.1], [1.0, 0.2]])
    with_zero = representativeness(gradients, normalize=False)
    assert with_zero[1] == 0.5
    without = representativeness(gradients[[0, 2, 3]], normalize=False)
    assert with_zero[[0, 2, 3]].tolist() == pytest.approx(without.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    "gradients",
    [torch.zeros(5, 3), torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), torch.tensor([[0.3, 0.7]]), torch.ones(4, 2)],
    ids=["all zero", "mean cancels", "one sample", "all equal"],
)
def test_no_information_gives_the_neutral_value(gradients):
    assert representativeness(gradients).tolist() == [0.5] * len(gradients)


def test_empty_pool_has_no_representativeness():
    assert representativeness(torch.zeros(0, 3)).tolist() == []


def test_equal_gradients_tie():
    values = representativeness(torch.tensor([[1.0, 0.2], [0.3, 1.0], [1.0, 0.2]]))
    assert values[0] == values[2]


def test_no_fresh_row_gives_the_neutral_value():
    assert representativeness(torch.randn(3, 2), fresh=torch.zeros(3, dtype=torch.bool)).tolist() == [0.5] * 3


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scale_of_gradients_does_not_matter(scale):
    gradients = np.random.default_rng(1).normal(size=(20, 4))
    np.testing.assert_allclose(
        representativeness(gradients * scale, normalize=False),
        representativeness(gradients, normalize=False),
        atol=1e-12,
    )


def test_tiny_gradient_of_one_sample_keeps_its_direction():
    gradients = torch.tensor([[1.0, 0.0], [1e-30, 0.0], [0.0, 1.0]])
    values = representativeness(gradients, normalize=False)
    assert values[1] == pytest.approx(float(values[0]))


@pytest.mark.parametrize(
    ("gradients", "fresh", "message"),
    [
        (torch.tensor([[1.0], [math.nan]]), None, "row 1"),
        (torch.tensor([[math.inf], [1.0]]), None, "row 0"),
        (torch.zeros(3), None, "shape"),
        (torch.zeros(3, 0), None, "at least one column"),
        (torch.zeros(3, 1), torch.ones(2), "fresh"),
    ],
)
def test_bad_input(gradients, fresh, message):
    with pytest.raises(InputError, match=message):
        representativeness(gradients, fresh=fresh)
