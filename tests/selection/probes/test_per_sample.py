"""Per-sample gradients against autograd one by one; the projection against its dense matrix and the JL bound."""

import math

import numpy as np
import pytest
import torch
from helpers.head_steps import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl import InputError
from minirec_pl.selection.probes import per_sample
from minirec_pl.selection.probes.per_sample import per_sample_gradients, project, project_gradients


def smooth(parameters, x, y):
    return ((parameters["w"] @ x).tanh() @ parameters["v"] - y).square()


def branching(parameters, x, y):
    """As `smooth`, with control flow that vmap refuses."""
    return smooth(parameters, x, y) if bool(y > 0) else -smooth(parameters, x, y)


@pytest.mark.parametrize("function", [smooth, branching])
@pytest.mark.parametrize("inference", [False, True])
def test_gradients_are_those_of_each_sample_alone(function, inference):
    parameters = {"w": drawn(0, 4, 3).requires_grad_(), "v": drawn(1, 4).requires_grad_(), "unused": drawn(2, 2)}
    with torch.inference_mode(inference):
        x, y = drawn(3, 6, 3), drawn(4, 6)
        got = per_sample_gradients(function, parameters, x, y)
    x, y = drawn(3, 6, 3), drawn(4, 6)
    for b in range(6):
        value = function(parameters, x[b], y[b])
        for name, truth in zip("wv", torch.autograd.grad(value, [parameters["w"], parameters["v"]]), strict=True):
            torch.testing.assert_close(got[name][b], truth)
    assert (got["unused"] == 0).all()
    assert all(not gradient.requires_grad for gradient in got.values())
    assert all(parameter.grad is None for parameter in parameters.values())
    assert parameters["w"].requires_grad
    assert not parameters["unused"].requires_grad


def test_an_error_of_the_function_is_not_hidden():
    with pytest.raises(RuntimeError, match="must match"):
        per_sample_gradients(lambda p, x: (p["w"] * x).sum(), {"w": torch.ones(3)}, torch.ones(2, 4))


# Projection


def dense(n, size, **options):
    """The matrix [n, size] of the projection, column by column of the identity."""
    return project(torch.eye(n, dtype=torch.float64), size, **options)


def test_is_linear():
    x, y = drawn(0, 3, 2000), drawn(1, 3, 2000)
    matrix = dense(2000, 64)
    torch.testing.assert_close(project(x, 64), x @ matrix)
    torch.testing.assert_close(project(x + 2 * y, 64), project(x, 64) + 2 * project(y, 64))
    torch.testing.assert_close(project(x.sum(dim=0, keepdim=True), 64)[0], project(x, 64).sum(dim=0))


@pytest.mark.slow
def test_inner_products_are_right_on_average_and_vary_within_the_bound():
    """Over 2,000 seeds: the mean within four standard errors, the variance below (|x|^2 |y|^2 + <x, y>^2) / k."""
    size, seeds = 32, 2000
    pairs = {
        "dense": drawn(0, 2, 300),
        "sparse": torch.zeros(2, 300, dtype=torch.float64),
        "equal": drawn(1, 1, 300).expand(2, 300).clone(),
    }
    pairs["sparse"][0, [3, 40]], pairs["sparse"][1, [3, 290]] = 1.0, 1.0
    for name, pair in pairs.items():
        values = []
        for seed in range(seeds):
            x, y = project(pair, size, seed=seed)
            values.append(float(x @ y))
        values = np.array(values)
        inner = float(pair[0] @ pair[1])
        bound = (float(pair[0] @ pair[0]) * float(pair[1] @ pair[1]) + inner**2) / size
        assert abs(values.mean() - inner) < 4 * math.sqrt(bound / seeds), name
        assert values.var() < 1.2 * bound, name
        assert values.var() > 0.05 * bound, name


def test_cosines_of_long_vectors_survive():
    base = drawn(0, 1, 100_000)
    vectors = torch.cat([base + share * drawn(1 + i, 1, 100_000) for i, share in enumerate(np.linspace(0, 3, 30))])
    sparse = torch.zeros(4, 100_000, dtype=torch.float64)
    sparse[torch.arange(4), torch.tensor([5, 700, 80_000, 99_999])] = 1.0
    vectors = torch.cat([vectors, sparse])

    def cosines(rows):
        unit = torch.nn.functional.normalize(rows, dim=1)
        return unit @ unit.T

    error = (cosines(project(vectors)) - cosines(vectors)).abs()
    assert float(error.max()) < 5 / math.sqrt(512)
    assert float(error.square().mean().sqrt()) < 1 / math.sqrt(512)


def test_a_vector_of_one_block_keeps_its_geometry():
    x = drawn(0, 5, 60)
    torch.testing.assert_close(project(x, 64) @ project(x, 64).T, x @ x.T)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5000), st.sampled_from([1, 8, 256]), st.integers(0, 2**31), st.integers(1, 6))
def test_the_same_seed_gives_the_same_bits_in_any_batch(n, size, seed, rows):
    x = drawn(seed, rows, n).float()
    together = project(x, size, seed=seed)
    assert together.shape == (rows, size)
    assert together.dtype == torch.float32
    for row in range(rows):
        assert torch.equal(project(x[row : row + 1], size, seed=seed)[0], together[row])
    assert torch.equal(project(x, size, seed=seed), together)


def test_threads_and_strides_do_not_change_a_bit():
    x = drawn(0, 8, 400_000).float()
    once = project(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(project(x), once)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(project(x.T.contiguous().T), once)


def test_other_seeds_and_streams_give_other_projections():
    x = drawn(0, 1, 1000)
    results = [project(x, 64, seed=seed, stream=stream) for seed, stream in ((0, 0), (1, 0), (0, 1))]
    assert not any(torch.allclose(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_known_values_guard_against_a_change_of_the_signs():
    """A store written by one release must fit the next."""
    x = torch.arange(1.0, 11.0)[None]
    expected = [2.5, -7.5, -6.5, 4.5]
    torch.testing.assert_close(project(x, 4, seed=3), torch.tensor([expected]))


def test_portions_are_drawn_apart(monkeypatch):
    monkeypatch.setattr(per_sample, "_BLOCKS", 2)
    matrix = dense(64, 8)
    torch.testing.assert_close(matrix.square().sum(dim=1), torch.ones(64, dtype=torch.float64))
    blocks = matrix.view(8, 8, 8)
    assert not any(torch.equal(blocks[i], blocks[j]) for i in range(8) for j in range(i))
    for block in blocks:
        torch.testing.assert_close(block @ block.T, torch.eye(8, dtype=torch.float64))


def test_parameters_are_projected_as_one_vector_with_signs_of_their_own():
    gradients = {"a": drawn(0, 3, 4, 50), "b": drawn(0, 3, 4, 50)}
    got = project_gradients(gradients, 64, seed=5)
    parts = [project(gradients["a"].flatten(1), 64, seed=5, stream=stream) for stream in (0, 1)]
    torch.testing.assert_close(got, parts[0] + parts[1])
    assert not torch.allclose(parts[0], parts[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: project(torch.ones(2, 3), 48), "must be a power of two, not 48"),
        (lambda: project(torch.ones(2, 3), 0), "must be a power of two, not 0"),
        (lambda: project(torch.ones(3)), r"must have the shape \[B, n\], not \[3\]"),
        (lambda: project_gradients({}), "there are no gradients to project"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
