"""Oracles: a stable argsort per row, torchmetrics.retrieval, float64 loops, and one process against two."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

from minirec_pl.metrics.ranking import MRR, NDCG, Coverage, HitRate, target_rank, top_items
from minirec_pl.utils.errors import InputError

N_ITEMS = 23


def random_case(seed: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [40, 23], targets and seen items with padding and repeats; some targets are in seen."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(40, N_ITEMS, generator=generator)
    if kind == "ties":
        scores = (scores * 1.5).round()
    if kind == "infinite":
        scores[torch.rand(scores.shape, generator=generator) < 0.5] = -torch.inf
    target = torch.randint(N_ITEMS, (40,), generator=generator)
    seen = torch.randint(-1, N_ITEMS, (40, 15), generator=generator)
    seen[:5] = -1
    return scores, target, seen


def ranking(scores: Tensor, seen: Tensor, keep: int | None = None) -> list[int]:
    """Unseen items of one row in the order of a stable argsort."""
    hidden = set(seen.tolist()) - {keep}
    order = np.argsort(-scores.double().numpy(), kind="stable")
    return [int(item) for item in order if int(item) not in hidden]


@pytest.mark.parametrize("kind", ["distinct", "ties", "infinite"])
@pytest.mark.parametrize("seed", range(5))
def test_target_rank_is_the_place_in_a_stable_argsort(seed: int, kind: str) -> None:
    scores, target, seen = random_case(seed, kind)
    expected = [
        ranking(row, hidden, keep=wanted).index(wanted) + 1
        for row, wanted, hidden in zip(scores, target.tolist(), seen, strict=True)
    ]
    assert target_rank(scores, target, seen).tolist() == expected


@pytest.mark.parametrize("k", [1, 4, 12, N_ITEMS, N_ITEMS + 3])
@pytest.mark.parametrize("kind", ["distinct", "ties", "infinite"])
def test_top_items_is_the_head_of_a_stable_argsort(k: int, kind: str) -> None:
    scores, _, seen = random_case(7, kind)
    got = top_items(scores, k, seen)
    for row, hidden, items in zip(scores, seen, got.tolist(), strict=True):
        reachable = [item for item in ranking(row, hidden) if row[item] > -torch.inf]
        assert items == (reachable + [-1] * k)[:k]


def test_rank_and_list_agree() -> None:
    scores, target, _ = random_case(3, "ties")
    seen = torch.full((40, 0), -1)
    rank = target_rank(scores, target, seen)
    lists = top_items(scores, N_ITEMS, seen)
    assert torch.equal(lists.gather(1, (rank - 1).unsqueeze(1)).squeeze(1), target)


def test_inputs_are_left_alone() -> None:
    scores, target, seen = random_case(1, "ties")
    before = scores.clone(), seen.clone()
    target_rank(scores, target, seen)
    top_items(scores, 5, seen)
    assert torch.equal(scores, before[0])
    assert torch.equal(seen, before[1])


def test_bad_scores_and_items_are_named() -> None:
    scores, target, seen = random_case(0, "distinct")
    scores[2, 9] = torch.nan
    with pytest.raises(InputError, match="item 9 in row 2 is NaN"):
        target_rank(scores, target, seen)
    with pytest.raises(InputError, match="item 9 in row 2 is NaN"):
        top_items(scores, 3, seen)
    scores[2, 9] = 0.0
    with pytest.raises(InputError, match="seen holds item 23"):
        top_items(scores, 3, torch.full((40, 1), N_ITEMS))
    with pytest.raises(InputError, match="target holds item -1"):
        target_rank(scores, torch.full((40,), -1), seen)
    with pytest.raises(InputError, match="k is 0"):
        top_items(scores, 0, seen)
    with pytest.raises(InputError, match="one target per row"):
        target_rank(scores, target[:3], seen)
    with pytest.raises(InputError, match="one row of each"):
        target_rank(scores, target, seen[:3])


@pytest.mark.parametrize("k", [1, 3, 10])
def test_metrics_equal_torchmetrics_retrieval_and_a_loop(k: int) -> None:
    scores, target, _ = random_case(11, "distinct")
    rank = target_rank(scores, target, torch.full((40, 1), -1))
    retrieval = {
        "preds": scores.softmax(dim=1).flatten(),  # torchmetrics ignores scores of 0 and below
        "target": torch.nn.functional.one_hot(target, N_ITEMS).flatten(),
        "indexes": torch.arange(40).repeat_interleave(N_ITEMS),
    }
    ranks = rank.tolist()
    oracles = [
        (HitRate(k), RetrievalHitRate(top_k=k), sum(r <= k for r in ranks) / 40),
        (NDCG(k), RetrievalNormalizedDCG(top_k=k), math.fsum(1 / math.log2(1 + r) for r in ranks if r <= k) / 40),
        (MRR(), RetrievalMRR(), math.fsum(1 / r for r in ranks) / 40),
    ]
    for ours, theirs, loop in oracles:
        for part in (slice(0, 13), slice(13, 14), slice(14, 40)):
            ours.update(rank[part], torch.arange(40)[part])
        theirs.update(**retrieval)
        assert float(ours.compute()) == pytest.approx(float(theirs.compute()), abs=1e-6)
        assert float(ours.compute()) == pytest.approx(loop, abs=1e-6)


def test_a_repeated_sample_counts_once_with_its_first_rank() -> None:
    metric = MRR()
    metric.update(torch.tensor([2, 4]), torch.tensor([70, 3]))
    metric.update(torch.tensor([1, 5, 5]), torch.tensor([70, 8, 8]))
    assert float(metric.compute()) == pytest.approx((1 / 2 + 1 / 4 + 1 / 5) / 3)


def test_large_sample_ids_stay_apart() -> None:
    metric = HitRate(1)
    metric.update(torch.tensor([1, 2]), torch.tensor([2**53, 2**53 + 1]))
    assert float(metric.compute()) == 0.5


def test_collection_shares_states_and_resets() -> None:
    collection = MetricCollection({"hit": HitRate(2), "ndcg": NDCG(2), "mrr": MRR()})
    for _ in range(2):
        for start in range(0, 12, 4):
            collection.update(torch.arange(start + 1, start + 5), torch.arange(start, start + 4))
        values = collection.compute()
        assert float(values["hit"]) == pytest.approx(2 / 12)
        assert float(values["ndcg"]) == pytest.approx((1 + 1 / math.log2(3)) / 12)
        assert float(values["mrr"]) == pytest.approx(sum(1 / r for r in range(1, 13)) / 12)
        collection.reset()
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(InputError, match="no samples"):
        MRR().compute()
    collection.update(torch.tensor([2]), torch.tensor([0]))
    assert float(collection.compute()["mrr"]) == 0.5


def test_forward_gives_the_batch_and_keeps_the_whole() -> None:
    metric = MRR()
    assert float(metric(torch.tensor([2]), torch.tensor([0]))) == 0.5
    assert float(metric(torch.tensor([1]), torch.tensor([1]))) == 1.0
    assert float(metric.compute()) == 0.75


def test_bad_updates_are_named() -> None:
    with pytest.raises(InputError, match="sample_id 6 has rank 0"):
        HitRate(3).update(torch.tensor([1, 0]), torch.tensor([5, 6]))
    with pytest.raises(InputError, match="one rank per sample"):
        NDCG(3).update(torch.tensor([1, 2]), torch.tensor([5]))
    with pytest.raises(InputError, match="k is 0"):
        NDCG(0)


def test_coverage_counts_distinct_items_of_the_first_k() -> None:
    metric = Coverage(k=2, n_items=10)
    metric.update(torch.tensor([[0, 1, 9], [1, -1, -1]]))
    metric.update(torch.tensor([[7, 0, 9]]))
    assert float(metric.compute()) == pytest.approx(3 / 10)
    metric.reset()
    metric.update(torch.tensor([[-1, -1]]))
    assert float(metric.compute()) == 0.0


def test_bad_coverage_is_named() -> None:
    metric = Coverage(k=2, n_items=10)
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(InputError, match="no samples"):
        metric.compute()
    with pytest.raises(InputError, match="holds item 10"):
        metric.update(torch.tensor([[3, 10]]))
    with pytest.raises(InputError, match="give at least 2 columns, \\[B, 2\\]"):
        metric.update(torch.tensor([[3]]))
    with pytest.raises(InputError, match="n_items is 0"):
        Coverage(k=1, n_items=0)


def metric_values(batches: list[tuple[Tensor, Tensor, Tensor]]) -> list[float]:
    hit_rate, coverage = HitRate(3), Coverage(k=2, n_items=50)
    metrics: list[Metric] = [hit_rate, NDCG(10), MRR()]
    for metric in metrics:
        metric.update(torch.tensor([1]), torch.tensor([99]))
        metric.reset()
    for rank, sample_id, items in batches:
        for metric in metrics:
            metric.update(rank, sample_id)
        coverage.update(items)
    return [float(metric.compute()) for metric in [*metrics, coverage]]


def rank_batches(process: int, case: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """21 samples over two processes; process 1 has more batches, and repeats sample 0 as a padded sampler does."""
    samples = torch.arange(21)
    ranks = samples * 5 % 13 + 1
    items = torch.stack([samples * 3 % 50, samples], dim=1)
    everything = ranks, samples, items
    if case == "empty":
        return [everything] if process == 0 else []
    parts = [slice(0, 10)] if process == 0 else [slice(10, 15), slice(15, 21), slice(0, 1)]
    return [(ranks[part], samples[part], items[part]) for part in parts]


def two_processes(process: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=2)
    values = {case: metric_values(rank_batches(process, case)) for case in ("uneven", "empty")}
    torch.save(values, f"{folder}/{process}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(two_processes, args=(str(tmp_path),), nprocs=2, start_method="fork")
    expected = metric_values(rank_batches(0, "empty"))
    for process in range(2):
        values = torch.load(tmp_path / f"{process}.pt")
        assert values["uneven"] == expected
        assert values["empty"] == expected
