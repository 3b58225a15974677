"""Facts about the real MovieLens-100K that later numbers rest on."""

import numpy as np
import pytest
import torch

from minirec_pl.data.datamodule import RecDataModule


@pytest.fixture(scope="module")
def data(ml_100k):
    data = RecDataModule(str(ml_100k.parent))
    data.setup()
    return data


def test_counts_and_cuts(data):
    counts = data.describe()
    assert (counts["users"], counts["items"], counts["interactions"]) == (943, 1682, 100_000)
    assert data.split == (70_003, 80_003, 90_000, 100_000)
    assert [counts[part] for part in ("warm", "pool", "validation", "test")] == [68_523, 9_803, 9_711, 9_828]
    assert 140 <= counts["test_users"] <= 170
    assert counts["repeats"] == 0
    assert data.catalogue.item_ids == [str(number) for number in range(1, 1683)]
    assert data.catalogue.titles[:2] == ["Toy Story", "GoldenEye"]
    assert data.catalogue.texts[0] == "Toy Story (1995), Animation, Children's, Comedy"
    shares = np.array([data.table.user, data.table.timestamp]).T
    _, sizes = np.unique(shares, axis=0, return_counts=True)
    assert round(sizes[sizes > 1].sum() / 1000) == 76


def test_popularity_reaches_the_floor_of_a_right_evaluation(data):
    """NDCG@10 of the most popular unseen items, full ranking: about 0.030, HR@10 about 0.06."""
    popularity = torch.from_numpy(data.item_popularity).double()
    hits, gains, n = 0, 0.0, 0
    for batch in data.test_dataloader():
        scores = popularity.repeat(len(batch["target"]), 1)
        rows, places = torch.nonzero(batch["seen"] >= 0, as_tuple=True)
        scores[rows, batch["seen"][rows, places]] = -1
        target = scores.gather(1, batch["target"][:, None])
        assert (target >= 0).all()
        rank = 1 + (scores > target).sum(dim=1)
        hits += int((rank <= 10).sum())
        gains += float((1 / torch.log2(1 + rank[rank <= 10].double())).sum())
        n += len(rank)
    assert n == 9_828
    assert 0.055 < hits / n < 0.07
    assert 0.028 < gains / n < 0.033
