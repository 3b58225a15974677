"""Oracles: plain greedy loops in float64, one with scalar arithmetic and one with a matrix-vector product a pick."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.errors import InputError
from minirec_pl.selection import diversity, maxmin_select


def distance(a: list[float], b: list[float]) -> float:
    norms = math.hypot(*a) * math.hypot(*b)
    return 1 - math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 1.0


def brute_force(
    embeddings: list[list[float]], scores: list[float], k: int, initial: list[int]
) -> tuple[list[int], list[float]]:
    chosen, picks, novelties = list(initial), [], []
    for _ in range(k):
        novelty = {
            x: min((distance(embeddings[x], embeddings[s]) for s in chosen), default=1.0)
            for x in range(len(scores))
            if x not in chosen
        }
        best = max(novelty[x] * scores[x] for x in novelty)
        pick = min(x for x in novelty if novelty[x] * scores[x] >= best - 1e-11)
        picks.append(pick)
        novelties.append(novelty[pick])
        chosen.append(pick)
    return picks, novelties


@st.composite
def problems(draw):
    n = draw(st.integers(1, 14))
    integers = st.lists(st.integers(-2, 2).map(float), min_size=3, max_size=3)
    reals = st.lists(st.floats(-1, 1, width=16), min_size=3, max_size=3)
    embeddings = draw(st.lists(draw(st.sampled_from([integers, reals])), min_size=n, max_size=n))
    scores = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=n, max_size=n))
    initial = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n - 1))
    return embeddings, scores, draw(st.integers(1, n - len(initial))), initial


@pytest.mark.parametrize("blocks", [(1024, 128, 16384), (3, 2, 4)], ids=["default blocks", "tiny blocks"])
def test_equals_brute_force_with_ties(blocks, monkeypatch):
    for name, size in zip(("_CANDIDATES", "_PICKS", "_ROWS"), blocks, strict=True):
        monkeypatch.setattr(diversity, name, size)

    @given(problems())
    @settings(deadline=None, max_examples=200, derandomize=True)
    def check(problem):
        embeddings, scores, k, initial = problem
        picks, novelties = brute_force(embeddings, scores, k, initial)
        got = maxmin_select(torch.tensor(embeddings, dtype=torch.float64), np.array(scores), k, initial=initial)
        assert got.indices.tolist() == picks
        np.testing.assert_allclose(got.novelty, novelties, atol=1e-11)

    check()


def clustered(n: int, width: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(20, width))[random.integers(0, 20, n)] + 0.3 * random.normal(size=(n, width))


def plain_greedy(embeddings: np.ndarray, scores: np.ndarray, k: int) -> list[int]:
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    picks = [int(scores.argmax())]
    nearest = np.full(len(scores), np.inf)
    while len(picks) < k:
        nearest = np.minimum(nearest, 1 - unit @ unit[picks[-1]])
        value = nearest * scores
        value[picks] = -1
        picks.append(int(value.argmax()))
    return picks


@pytest.mark.parametrize("make", [clustered, lambda n, d, s: np.random.default_rng(s).normal(size=(n, d))])
def test_equals_plain_greedy_on_a_pool_larger_than_the_blocks(make):
    embeddings, scores = make(5000, 16, 0), np.random.default_rng(1).uniform(0, 2, 5000)
    assert maxmin_select(embeddings, scores, 600).indices.tolist() == plain_greedy(embeddings, scores, 600)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_picks_are_within_1e4_of_the_best(dtype):
    embeddings = torch.from_numpy(clustered(3000, 24, 2)).to(dtype)
    scores = np.random.default_rng(3).uniform(0, 2, 3000)
    picks = maxmin_select(embeddings, scores, 300).indices.tolist()
    exact = embeddings.double().numpy()
    unit = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    nearest = np.ones(3000)
    for step, pick in enumerate(picks):
        value = nearest * scores
        value[picks[:step]] = -1
        assert value[pick] >= value.max() - 1e-4
        nearest = np.minimum(nearest if step else np.inf, 1 - unit @ unit[pick])


def test_smaller_selection_is_a_prefix():
    embeddings, scores = clustered(2500, 8, 4).astype(np.float32), np.random.default_rng(5).uniform(size=2500)
    largest = maxmin_select(embeddings, scores, 700)
    for k in (1, 2, 129, 500):
        part = maxmin_select(embeddings, scores, k)
        assert part.indices.tolist() == largest.indices[:k].tolist()
        np.testing.assert_allclose(part.novelty, largest.novelty[:k], atol=1e-6)


def test_continuing_equals_selecting_at_once():
    embeddings, scores = clustered(400, 8, 6), np.random.default_rng(7).uniform(size=400)
    whole = maxmin_select(embeddings, scores, 60)
    rest = maxmin_select(embeddings, scores, 40, initial=whole.indices[:20])
    assert rest.indices.tolist() == whole.indices[20:].tolist()


def test_each_row_is_picked_once_when_k_is_n():
    embeddings = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert sorted(maxmin_select(embeddings, torch.ones(50), 50).indices.tolist()) == list(range(50))


def test_equal_rows_come_in_order():
    picked = maxmin_select(torch.full((6, 3), 0.1), torch.full((6,), 0.7), 6)
    assert picked.indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert picked.novelty.tolist() == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-6)


def test_zero_embeddings_leave_the_order_to_the_score():
    scores = torch.tensor([0.2, 0.9, 0.9, 0.1])
    picked = maxmin_select(torch.zeros(4, 3), scores, 4)
    assert picked.indices.tolist() == [1, 2, 0, 3]
    assert picked.novelty.tolist() == [1, 1, 1, 1]


def test_zero_scores_still_give_k_distinct_picks():
    assert maxmin_select(torch.eye(4), torch.zeros(4), 4).indices.tolist() == [0, 1, 2, 3]


def test_one_row():
    picked = maxmin_select(torch.ones(1, 2), torch.ones(1), 1)
    assert picked.indices.tolist() == [0]
    assert picked.novelty.tolist() == [1.0]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_length_of_embeddings_does_not_matter(scale):
    embeddings, scores = clustered(300, 6, 8), np.random.default_rng(9).uniform(size=300)
    expected = maxmin_select(embeddings.astype(np.float32), scores, 50).indices.tolist()
    assert maxmin_select((embeddings * scale).astype(np.float32), scores, 50).indices.tolist() == expected


@pytest.mark.parametrize(
    ("embeddings", "scores", "k", "initial", "message"),
    [
        (torch.eye(3), torch.ones(3), 4, None, r"k must lie in 1\.\.3"),
        (torch.eye(3), torch.ones(3), 0, None, r"k must lie in 1\.\.3"),
        (torch.eye(3), torch.ones(3), 2, [0, 1], r"k must lie in 1\.\.1"),
        (torch.eye(3), torch.ones(3), 1, [3], "initial"),
        (torch.eye(3), torch.ones(3), 1, [1, 1], "initial"),
        (torch.eye(3), torch.ones(2), 1, None, "scores must have the shape"),
        (torch.eye(3), torch.tensor([1.0, math.nan, 1.0]), 1, None, "score in row 1"),
        (torch.eye(3), torch.tensor([1.0, 1.0, -0.1]), 1, None, "score in row 2"),
        (torch.tensor([[1.0], [math.nan]]), torch.ones(2), 1, None, "embedding in row 1"),
        (torch.ones(3), torch.ones(3), 1, None, "embeddings must have the shape"),
    ],
)
def test_bad_input(embeddings, scores, k, initial, message):
    with pytest.raises(InputError, match=message):
        maxmin_select(embeddings, scores, k, initial=initial)
