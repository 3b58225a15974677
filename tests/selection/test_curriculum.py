import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.errors import InputError
from minirec_pl.selection import default_folds, fold_curriculum, fold_starts


def test_published_curriculum(published):
    chosen = published["selected_256"]
    plan = fold_curriculum(chosen, published["rewards"].mean(axis=1)[chosen], 4)
    assert plan == published["curriculum_256"].tolist()


@given(
    st.lists(
        st.tuples(st.integers(0, 500), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, unique_by=lambda x: x[0]
    ),
    st.integers(1, 5),
    st.integers(0, 3),
)
@settings(deadline=None)
def test_folds_partition_the_seeded_shuffle_and_are_sorted(samples, n_folds, seed):
    n_folds = min(n_folds, len(samples))
    ids, rewards = zip(*samples, strict=True)
    plan = fold_curriculum(list(ids), list(rewards), n_folds, seed=seed)

    shuffled = sorted(ids)
    random.Random(seed).shuffle(shuffled)
    size, reward = len(ids) // n_folds, dict(samples)
    starts = fold_starts(len(ids), n_folds)
    for fold, start in enumerate(starts):
        end = start + size if fold < n_folds - 1 else len(ids)
        members = shuffled[start:end]
        assert sorted(plan[start:end]) == sorted(members)
        keys = [(-reward[i], members.index(i)) for i in plan[start:end]]
        assert keys == sorted(keys)


def test_order_of_the_input_does_not_matter():
    ids, rewards = torch.arange(100), torch.rand(100)
    turned = torch.randperm(100)
    assert fold_curriculum(ids, rewards, 3) == fold_curriculum(ids[turned], rewards[turned], 3)


@pytest.mark.parametrize(("n", "folds"), [(1, 1), (63, 1), (64, 1), (127, 1), (128, 2), (1000, 15)])
def test_default_folds(n, folds):
    assert default_folds(n) == folds


def test_last_fold_takes_the_rest():
    assert fold_starts(11, 3) == [0, 3, 6]


@pytest.mark.parametrize(
    ("ids", "rewards", "n_folds", "message"),
    [
        ([1, 2, 1], [0.1, 0.2, 0.3], 1, "sample_id 1 occurs more than once"),
        ([1, 2], [0.1, math.nan], 1, "reward of sample_id 2 is NaN"),
        ([1, 2], [0.1], 1, "one per sample_id"),
        ([1, 2], [0.1, 0.2], 3, r"n_folds must lie in 1\.\.2"),
        ([1, 2], [0.1, 0.2], 0, r"n_folds must lie in 1\.\.2"),
    ],
)
def test_bad_input(ids, rewards, n_folds, message):
    with pytest.raises(InputError, match=message):
        fold_curriculum(ids, rewards, n_folds)
