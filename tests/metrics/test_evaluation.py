"""Figures and their standard errors against plain loops."""

import math

import numpy as np
import pytest
import torch

from minirec_pl.metrics.evaluation import popularity_figures, ranking_figures
from minirec_pl.metrics.ranking import SampleRanks


def plain(ranks, users):
    """Means, errors of independent samples, errors of independent users, by their definitions."""
    found = {}
    for name, gain in (
        ("hit_rate@10", lambda rank: 1.0 if rank <= 10 else 0.0),
        ("ndcg@10", lambda rank: 1 / math.log2(1 + rank) if rank <= 10 else 0.0),
    ):
        values = [gain(rank) for rank in ranks]
        n, mean = len(values), sum(values) / len(values)
        clusters = {}
        for value, user in zip(values, users, strict=True):
            clusters[user] = clusters.get(user, 0.0) + value - mean
        m = len(clusters)
        found[name] = mean
        found[f"{name}_se"] = math.sqrt(sum((value - mean) ** 2 for value in values) / (n * (n - 1)))
        found[f"{name}_se_users"] = math.sqrt(m / (m - 1) * sum(total**2 for total in clusters.values())) / n
    return found | {"samples": len(ranks), "users": len(set(users))}


@pytest.mark.parametrize("n_users", [3, 40, 100_000])
def test_figures_equal_a_loop(n_users):
    rng = np.random.default_rng(n_users)
    ranks, users = rng.integers(1, 30, 200), rng.integers(0, n_users, 200) * 7
    assert ranking_figures(torch.from_numpy(ranks), users) == pytest.approx(plain(ranks.tolist(), users.tolist()))


def test_both_errors_agree_where_every_user_has_one_sample():
    figures = ranking_figures(torch.tensor([1, 5, 80, 3]), np.array([4, 2, 9, 7]))
    for name in ("hit_rate@10", "ndcg@10"):
        assert figures[f"{name}_se"] == pytest.approx(figures[f"{name}_se_users"])


def test_repeating_each_sample_shrinks_only_the_error_of_samples():
    ranks, users = torch.tensor([1, 5, 80, 3, 40]), np.arange(5)
    once = ranking_figures(ranks, users)
    often = ranking_figures(ranks.repeat(50), np.tile(users, 50))
    assert often["ndcg@10_se_users"] == pytest.approx(once["ndcg@10_se_users"])
    assert often["ndcg@10_se"] < 0.2 * once["ndcg@10_se"]


def test_ranks_keep_each_sample_once():
    metric = SampleRanks()
    metric.update(torch.tensor([3, 8]), torch.tensor([20, 10]))
    metric.update(torch.tensor([5, 1]), torch.tensor([10, 30]))
    assert metric.compute().tolist() == [[10, 8], [20, 3], [30, 1]]


def test_popularity_ranks_by_counts_of_the_train_part(toy_data):
    data = toy_data()
    data.setup("fit")
    counts = data.item_popularity.tolist()
    ranks, users = [], []
    for sample in data.test_ids.tolist():
        seen, target = set(data.table.seen(sample).tolist()), int(data.table.item[sample])
        order = sorted((i for i in range(len(counts)) if i not in seen), key=lambda i: -counts[i])
        ranks.append(order.index(target) + 1)
        users.append(int(data.table.user[sample]))
    assert popularity_figures(data) == pytest.approx(plain(ranks, users))
