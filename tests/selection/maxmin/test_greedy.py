"""Oracles: plain greedy loops in float64, one with scalar arithmetic and one with a matrix-vector product a pick."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.selection import maxmin_select
from minirec_pl.selection.maxmin import lazy as lazy_greedy
from minirec_pl.selection.maxmin import unit_rows
from minirec_pl.selection.maxmin.greedy import nearest_pick
from minirec_pl.utils.errors import InputError


def distance(a: list[float], b: list[float]) -> float:
    norms = math.hypot(*a) * math.hypot(*b)
    return 1 - math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 1.0


def brute_force(
    embeddings: list[list[float]], scores: list[float], k: int, initial: list[int], pool: list[int]
) -> tuple[list[int], list[float]]:
    gap = [[distance(a, b) for b in embeddings] for a in embeddings]
    chosen, picks, novelties = list(initial), [], []
    for _ in range(k):
        novelty = {x: min((gap[x][s] for s in chosen), default=1.0) for x in pool if x not in chosen}
        best = max(novelty[x] * scores[x] for x in novelty)
        pick = min(x for x in novelty if novelty[x] * scores[x] >= best - 1e-11)
        picks.append(pick)
        novelties.append(novelty[pick])
        chosen.append(pick)
    return picks, novelties


@st.composite
def problems(draw):
    n = draw(st.integers(1, 24))
    integers = st.lists(st.integers(-2, 2).map(float), min_size=3, max_size=3)
    reals = st.lists(st.floats(-1, 1, width=16), min_size=3, max_size=3)
    embeddings = draw(st.lists(draw(st.sampled_from([integers, reals])), min_size=n, max_size=n))
    scores = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=n, max_size=n))
    initial = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n - 1))
    return embeddings, scores, draw(st.integers(1, n - len(initial))), initial


def shrink(monkeypatch, candidates: int, picks: int, few: int, block: int) -> None:
    for module, name, size in (
        (lazy_greedy, "_FEWEST", candidates),
        (lazy_greedy, "_MOST", candidates),
        (lazy_greedy, "PICKS", picks),
        (unit_rows, "PICKS", picks),
        (lazy_greedy, "_FEW", few),
        (unit_rows, "_BLOCK", block),
    ):
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("blocks", [None, (3, 2, 2, 12), (5, 4, 3, 3)], ids=["default blocks", "tiny", "other tiny"])
def test_equals_brute_force_with_ties(blocks, monkeypatch):
    if blocks:
        shrink(monkeypatch, *blocks)

    @given(problems())
    @settings(deadline=None, max_examples=200, derandomize=True)
    def check(problem):
        embeddings, scores, k, initial = problem
        picks, novelties = brute_force(embeddings, scores, k, initial, list(range(len(scores))))
        got = maxmin_select(torch.tensor(embeddings, dtype=torch.float64), np.array(scores), k, initial=initial)
        assert got.indices.tolist() == picks
        np.testing.assert_allclose(got.novelty, novelties, atol=1e-11)

    check()


@given(problems(), st.integers(0, 23))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_pool_equals_brute_force_on_its_rows(problem, more):
    embeddings, scores, k, initial = problem
    free = [x for x in range(len(scores)) if x not in initial]
    pool = sorted(free, key=lambda x: (-scores[x], x))[: k + more]
    picks, _ = brute_force(embeddings, scores, k, initial, pool)
    got = maxmin_select(np.array(embeddings), np.array(scores), k, initial=initial, pool=k + more)
    assert got.indices.tolist() == picks


@given(problems())
@settings(deadline=None, max_examples=200, derandomize=True)
def test_nearest_pick_equals_brute_force(problem):
    embeddings, _, _, picks = problem
    picks = picks or [0]
    got = nearest_pick(np.array(embeddings), picks)
    for row, embedding in enumerate(embeddings):
        gap = [distance(embedding, embeddings[pick]) for pick in picks]
        assert got.position[row] == min(place for place, d in enumerate(gap) if d <= min(gap) + 1e-11)
        assert float(got.distance[row]) == pytest.approx(min(gap), abs=1e-11)


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


def isotropic(n: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width))


@pytest.mark.parametrize("make", [clustered, isotropic])
@pytest.mark.parametrize("blocks", [None, (64, 16, 8, 2000), (48, 100, 5, 320)])
@pytest.mark.parametrize("high", [2.0, 0.0], ids=["scores differ", "scores are equal"])
def test_equals_plain_greedy_on_a_pool_larger_than_the_blocks(make, blocks, high, monkeypatch):
    if blocks:
        shrink(monkeypatch, *blocks)
    embeddings, scores = make(5000, 16, 0), 1 + np.random.default_rng(1).uniform(-high / 2, high / 2, 5000)
    assert maxmin_select(embeddings, scores, 600).indices.tolist() == plain_greedy(embeddings, scores, 600)


def test_one_huge_score_does_not_blur_the_others():
    embeddings, scores = isotropic(500, 8, 20).astype(np.float32), np.random.default_rng(21).uniform(1, 2, 500)
    scores[77] = 1e9
    expected = plain_greedy(embeddings.astype(np.float64), scores, 100)
    assert maxmin_select(embeddings, scores, 100).indices.tolist() == expected


def as_memmap(embeddings: np.ndarray, folder) -> np.ndarray:
    path = folder / "embeddings.npy"
    np.save(path, embeddings.astype(np.float16))
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, np.float16, "memmap", "transposed"])
def test_low_precision_picks_are_within_1e4_of_the_best(kind, tmp_path):
    embeddings = clustered(3000, 24, 2)
    if kind == "memmap":
        low = as_memmap(embeddings, tmp_path)
        assert isinstance(low, np.memmap)
    elif kind == "transposed":
        low = torch.from_numpy(embeddings).float().T.contiguous().T
    elif kind is np.float16:
        low = embeddings.astype(kind)
    else:
        low = torch.from_numpy(embeddings).to(kind)
    scores = np.random.default_rng(3).uniform(0, 2, 3000)
    picks = maxmin_select(low, scores.astype(np.float32), 300).indices.tolist()
    assert len(set(picks)) == 300
    exact = torch.as_tensor(np.array(low) if kind == "memmap" else low).double().numpy()
    unit = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    nearest = np.ones(3000)
    for step, pick in enumerate(picks):
        value = nearest * scores
        value[picks[:step]] = -1
        assert value[pick] >= value.max() - 1e-4
        nearest = np.minimum(nearest if step else np.inf, 1 - unit @ unit[pick])


_IN_LITTLE_MEMORY = """
import resource, sys
import numpy as np
import torch
from minirec_pl.selection import maxmin_select
from minirec_pl.selection.maxmin.greedy import nearest_pick

torch.set_num_threads(1)
embeddings = np.load(sys.argv[1], mmap_mode="r")
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmData"].split()[0]) * 1024 + embeddings.nbytes * 3 // 4
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
picks = maxmin_select(embeddings, np.random.default_rng(0).uniform(size=len(embeddings)), 20).indices
nearest_pick(embeddings, picks)
try:
    torch.from_numpy(np.array(embeddings))
except MemoryError:
    print("a copy does not fit")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on private memory is Linux's")
def test_a_mapped_file_is_never_copied_whole(tmp_path):
    path = tmp_path / "embeddings.npy"
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(600_000, 128))
    random = np.random.default_rng(0)
    for start in range(0, len(file), 100_000):
        file[start : start + 100_000] = random.integers(-9, 10, size=(100_000, 128), dtype=np.int8)
    file.flush()
    child = subprocess.run([sys.executable, "-c", _IN_LITTLE_MEMORY, path], capture_output=True, text=True)
    assert child.stdout == "a copy does not fit\n", child.stderr


def test_products_are_taken_in_full_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with unit_rows.full_precision(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_settings_for_faster_products_elsewhere_change_nothing():
    embeddings, scores = torch.from_numpy(clustered(2000, 64, 10)).float(), np.ones(2000)
    expected = maxmin_select(embeddings, scores, 100)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = maxmin_select(embeddings.requires_grad_(), scores, 100)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert got.indices.tolist() == expected.indices.tolist()
    assert got.novelty.tolist() == expected.novelty.tolist()


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
    rest = maxmin_select(embeddings, scores, 40, initial=whole.indices[:20], pool=380)
    assert rest.indices.tolist() == whole.indices[20:].tolist()


@pytest.mark.parametrize(("dtype", "slack"), [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_a_row_that_was_not_tied_with_a_covered_best_may_be_with_the_next(dtype, slack):
    embeddings, scores = np.eye(200, dtype=dtype), np.full(200, 1 - 0.6 * slack)
    scores[[0, 198, 199]] = 1 - 1.5 * slack, 1, 2
    embeddings[198] = embeddings[1]  # the best of all, so long as row 1 is not picked
    picked = maxmin_select(embeddings, scores, 6).indices.tolist()
    assert picked == [199, 1, 0, 2, 3, 4]
    assert maxmin_select(embeddings, scores, 4, initial=picked[:2]).indices.tolist() == picked[2:]


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


@pytest.mark.parametrize("rows", ["zero", "equal", "one of each direction"])
def test_thousands_of_ties_come_in_order(rows, monkeypatch):
    shrink(monkeypatch, 64, 16, 8, 1000)
    embeddings = {
        "zero": torch.zeros(3000, 4),
        "equal": torch.full((3000, 4), 0.3),
        "one of each direction": torch.eye(60).repeat_interleave(50, dim=0),
    }[rows]
    expected = list(range(0, 3000, 50)) if rows == "one of each direction" else []
    expected += [row for row in range(400) if row not in expected][: 400 - len(expected)]
    assert maxmin_select(embeddings, torch.full((3000,), 0.7), 400).indices.tolist() == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_values_that_only_rounding_parts_are_tied(dtype, scale, monkeypatch):
    shrink(monkeypatch, 64, 16, 8, 1000)
    random = np.random.default_rng(16)
    basis = np.linalg.qr(random.normal(size=(150, 150)))[0]  # all distances are 1 up to rounding
    direction = random.integers(0, 150, 2000)
    embeddings = basis[direction] * random.uniform(0.5, 2, size=(2000, 1))
    firsts = sorted(int((direction == d).argmax()) for d in np.unique(direction))
    scores = np.full(2000, scale)
    picks = maxmin_select(embeddings.astype(dtype), scores, len(firsts)).indices.tolist()
    assert picks == firsts


def test_zero_scores_still_give_k_distinct_picks():
    assert maxmin_select(torch.eye(4), torch.zeros(4), 4).indices.tolist() == [0, 1, 2, 3]


def test_zero_scores_have_the_true_novelty():
    embeddings = isotropic(40, 3, 11)
    picked = maxmin_select(embeddings, np.zeros(40), 40)
    assert picked.indices.tolist() == list(range(40))
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    gap = 1 - unit @ unit.T
    np.testing.assert_allclose(picked.novelty[1:], [gap[i, :i].min() for i in range(1, 40)], atol=1e-11)


def test_rows_outside_the_pool_are_not_read():
    embeddings, scores = torch.eye(4), torch.tensor([1.0, 0.1, 0.9, 0.8])
    embeddings[1] = math.nan
    assert maxmin_select(embeddings, scores, 2, pool=3).indices.tolist() == [0, 2]
    embeddings[3] = math.inf
    with pytest.raises(InputError, match="embedding in row 3 is NaN"):
        maxmin_select(embeddings, scores, 2, pool=3)


@pytest.mark.parametrize("progress", [False, True])
def test_progress_bar_on_stderr(progress, capsys):
    maxmin_select(torch.eye(5), torch.ones(5), 3, progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("Selecting" in captured.err) == progress


def test_integers_are_numbers_too():
    embeddings = np.random.default_rng(12).integers(-3, 4, size=(200, 5))
    picks = maxmin_select(embeddings, np.arange(200), 50).indices.tolist()
    assert picks == maxmin_select(embeddings.astype(np.float32), np.arange(200.0), 50).indices.tolist()


def test_one_row():
    picked = maxmin_select(torch.ones(1, 2), torch.ones(1), 1)
    assert picked.indices.tolist() == [0]
    assert picked.novelty.tolist() == [1.0]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float32, 1e-30), (np.float32, 1e30), (np.float32, 1e37), (np.float64, 1e-200), (np.float64, 1e300)],
)
def test_length_of_embeddings_does_not_matter(dtype, scale):
    embeddings, scores = clustered(300, 6, 8), np.random.default_rng(9).uniform(size=300)
    expected = maxmin_select(embeddings.astype(dtype), scores, 50)
    scaled = embeddings.copy()
    scaled[::2] *= scale
    got = maxmin_select(scaled.astype(dtype), scores, 50)
    assert got.indices.tolist() == expected.indices.tolist()
    np.testing.assert_allclose(got.novelty, expected.novelty, atol=1e-6)


@pytest.mark.parametrize(
    ("embeddings", "scores", "options", "message"),
    [
        (torch.eye(3), torch.ones(3), {"k": 4}, r"give 1 to 3,"),
        (torch.eye(3), torch.ones(3), {"k": 0}, r"give 1 to 3,"),
        (torch.eye(3), torch.ones(3), {"k": 2, "initial": [0, 1]}, r"give 1 to 1,"),
        (torch.eye(3), torch.ones(3), {"k": 1, "initial": [3]}, "initial"),
        (torch.eye(3), torch.ones(3), {"k": 1, "initial": [-1]}, "initial"),
        (torch.eye(3), torch.ones(3), {"k": 1, "initial": [1, 1]}, "initial"),
        (torch.eye(3), torch.ones(3), {"k": 2, "pool": 1}, "pool is 1: give at least k = 2"),
        (torch.eye(3), torch.ones(2), {"k": 1}, "scores have the shape"),
        (torch.eye(3), torch.tensor([1.0, math.nan, 1.0]), {"k": 1}, "score in row 1"),
        (torch.eye(3), torch.tensor([1.0, 1.0, -0.1]), {"k": 1}, "score in row 2"),
        (torch.tensor([[1.0], [math.nan]]), torch.ones(2), {"k": 1}, "embedding in row 1"),
        (torch.tensor([[0.0], [1.0], [-math.inf]]), torch.ones(3), {"k": 1}, "embedding in row 2"),
        (np.array([[1, 1], [2, math.nan]], dtype=np.float16), torch.ones(2), {"k": 1}, "embedding in row 1"),
        (torch.ones(3), torch.ones(3), {"k": 1}, "embeddings have the shape"),
        (torch.ones(3, 2, dtype=torch.complex64), torch.ones(3), {"k": 1}, "give real ones"),
        (np.array([["a"], ["b"]]), torch.ones(2), {"k": 1}, "cannot be read in place"),
        (np.ones((2, 2), dtype=">f4"), torch.ones(2), {"k": 1}, "cannot be read in place"),
    ],
)
def test_bad_input(embeddings, scores, options, message):
    with pytest.raises(InputError, match=message):
        maxmin_select(embeddings, scores, **options)


@pytest.mark.parametrize(
    ("embeddings", "picks", "message"),
    [
        (torch.eye(3), [], "picks is empty"),
        (torch.eye(3), [3], r"each in 0\.\.2"),
        (torch.eye(3), [-1], r"each in 0\.\.2"),
        (torch.tensor([[1.0], [math.nan]]), [0], "embedding in row 1"),
    ],
)
def test_bad_input_of_nearest_pick(embeddings, picks, message):
    with pytest.raises(InputError, match=message):
        nearest_pick(embeddings, picks)


def test_nearest_pick_in_float16_with_more_picks_than_a_block(tmp_path):
    embeddings = as_memmap(clustered(1500, 12, 13), tmp_path)
    picks = np.random.default_rng(14).permutation(1500)[:700]
    got = nearest_pick(embeddings, picks)
    exact = embeddings.astype(np.float64)
    unit = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    gap = 1 - unit @ unit[picks].T
    np.testing.assert_allclose(got.distance, gap.min(axis=1), atol=2e-6)
    np.testing.assert_allclose(gap[np.arange(1500), got.position], gap.min(axis=1), atol=4e-6)
    assert got.position[picks].tolist() == list(range(700))


def test_a_picked_twin_is_the_nearest_and_the_first_of_equals_counts():
    embeddings = torch.randn(3, 40, generator=torch.Generator().manual_seed(15)).repeat(200, 1)
    got = nearest_pick(embeddings, list(range(599, -1, -1)))
    assert got.position.tolist() == [[2, 1, 0][row % 3] for row in range(600)]
    assert got.distance.tolist() == [0.0] * 600
