import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.selection import (
    default_folds,
    fold_curriculum,
    fold_starts,
    gaussian_curriculum,
    hard_to_easy_curriculum,
    move_target,
    shuffled_curriculum,
    target_curriculum,
)
from minirec_pl.utils.errors import InputError


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
        ([], [], 1, "the selection is empty"),
        ([1, 2], [0.1, 0.2], 3, r"give 1 to 2, the number of selected samples"),
        ([1, 2], [0.1, 0.2], 0, r"give 1 to 2, the number of selected samples"),
    ],
)
def test_bad_input(ids, rewards, n_folds, message):
    with pytest.raises(InputError, match=message):
        fold_curriculum(ids, rewards, n_folds)


tied_samples = st.lists(
    st.tuples(st.integers(0, 500), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, unique_by=lambda x: x[0]
)


def test_one_fold_is_the_global_easy_to_hard_order():
    rewards = np.random.default_rng(0).permutation(50) / 50
    assert fold_curriculum(np.arange(50), rewards, 1) == sorted(range(50), key=lambda i: -rewards[i])


def test_rewards_may_be_half_precision_or_integers():
    assert fold_curriculum(np.arange(3), np.array([1, 3, 2], dtype=np.float16), 1) == [1, 2, 0]
    assert fold_curriculum(torch.arange(3), torch.tensor([1, 3, 2]), 1) == [1, 2, 0]


@given(tied_samples, st.integers(0, 3))
@settings(deadline=None)
def test_shuffle_is_seeded_and_does_not_depend_on_the_input_order(samples, seed):
    ids = [i for i, _ in samples]
    expected = sorted(ids)
    random.Random(seed).shuffle(expected)
    assert shuffled_curriculum(ids, seed=seed) == shuffled_curriculum(ids[::-1], seed=seed) == expected


def test_each_epoch_can_have_its_own_shuffle():
    plans = [tuple(shuffled_curriculum(range(50), seed=f"1-{epoch}")) for epoch in range(4)]
    assert len(set(plans)) == 4


@given(tied_samples, st.integers(0, 3))
@settings(deadline=None)
def test_hard_to_easy_sorts_by_reward_and_breaks_ties_at_random(samples, seed):
    ids, rewards = zip(*samples, strict=True)
    shuffled = sorted(ids)
    random.Random(seed).shuffle(shuffled)
    reward = dict(samples)
    expected = sorted(ids, key=lambda i: (reward[i], shuffled.index(i)))
    assert hard_to_easy_curriculum(list(ids), list(rewards), seed=seed) == expected


@given(tied_samples, st.floats(0, 1), st.integers(0, 3))
@settings(deadline=None)
def test_target_order_goes_by_distance_in_difficulty(samples, target, seed):
    ids, rewards = zip(*samples, strict=True)
    shuffled = sorted(ids)
    random.Random(seed).shuffle(shuffled)
    reward = dict(samples)
    plan = target_curriculum(list(ids), list(rewards), target, seed=seed)
    assert sorted(plan) == sorted(ids)
    keys = [(abs((1 - reward[i]) - target), shuffled.index(i)) for i in plan]
    assert keys == sorted(keys)


def test_the_ends_of_the_target_are_the_sorted_orders():
    rewards = np.random.default_rng(1).permutation(40) / 40
    easy, hard = fold_curriculum(range(40), rewards, 1), hard_to_easy_curriculum(range(40), rewards)
    assert target_curriculum(range(40), rewards, 0.0) == easy
    assert target_curriculum(range(40), rewards, 1.0) == hard == easy[::-1]


@pytest.mark.parametrize("reward", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_target_moves_as_published(reward):
    theirs = 30 + 50 * (math.exp(4 * (reward - 0.5)) - 1) / (math.exp(4 * (reward - 0.5)) + 1)  # of 100, tanh spelt out
    assert move_target(0.3, reward) == pytest.approx(min(max(theirs, 0), 100) / 100)
    scaled = move_target(0.3, reward, step_size=0.1, sensitivity=1.0, target_reward=0.2)
    assert scaled == pytest.approx(min(max(0.3 + 0.1 * math.tanh(reward - 0.2), 0), 1))


def level_chances(progress, n_levels, exponent, width):
    mean = progress**exponent * (n_levels - 1)
    weights = [math.exp(-((level - mean) ** 2) / (2 * width**2)) for level in range(n_levels)]
    return [weight / sum(weights) for weight in weights]


@given(tied_samples, st.integers(1, 4), st.integers(0, 2))
@settings(deadline=None)
def test_gaussian_plan_is_a_seeded_permutation(samples, n_levels, epoch):
    ids, rewards = zip(*samples, strict=True)
    options = {"epoch": epoch, "epochs": 3, "n_levels": min(n_levels, len(ids))}
    plan = gaussian_curriculum(list(ids), list(rewards), **options)
    assert sorted(plan) == sorted(ids)
    assert plan == gaussian_curriculum(list(ids)[::-1], list(rewards)[::-1], **options)


@pytest.mark.parametrize(("epoch", "exponent", "width"), [(0, 0.5, 0.5), (1, 0.5, 0.8), (2, 1.0, 1.5), (3, 0.25, 0.75)])
def test_gaussian_draws_levels_with_the_published_chances(epoch, exponent, width):
    """First draws of many seeds: 40 samples in 4 levels of 10, easiest first."""
    rewards, counts = np.linspace(1, 0, 40), np.zeros(4)
    for seed in range(600):
        plan = gaussian_curriculum(range(40), rewards, epoch=epoch, epochs=4, exponent=exponent, width=width, seed=seed)
        counts[plan[0] // 10] += 1
    chances = np.array(level_chances(epoch / 4, 4, exponent, width))
    assert (abs(counts - 600 * chances) <= 4.5 * np.sqrt(600 * chances * (1 - chances)) + 1).all()


def test_gaussian_levels_with_samples_left_share_the_chance():
    """Two samples of three levels: after the first draw its level is empty, and the others keep their odds."""
    counts = np.zeros(3)
    for seed in range(2000):
        plan = gaussian_curriculum(range(3), [0.9, 0.5, 0.1], epoch=0, epochs=1, n_levels=3, width=1.0, seed=seed)
        if plan[0] == 1:
            counts[plan[1]] += 1
    odds = level_chances(1 / 3, 3, 0.5, 1.0)
    share = odds[0] / (odds[0] + odds[2])
    assert counts[1] == 0
    assert abs(counts[0] - counts.sum() * share) < 4.5 * math.sqrt(counts.sum() * share * (1 - share))


def test_gaussian_training_moves_from_easy_to_hard():
    rewards = np.linspace(1, 0, 400)
    heads = [np.mean(gaussian_curriculum(range(400), rewards, epoch=e, epochs=4)[:100]) for e in range(4)]
    assert heads == sorted(heads)
    assert heads[0] < 120
    assert heads[3] > 280


def test_gaussian_with_a_narrow_width_takes_the_nearest_level_that_has_samples_left():
    plan = gaussian_curriculum(range(40), np.linspace(1, 0, 40), epoch=1, epochs=3, exponent=1.0, width=0.003)
    left = [10] * 4
    for position, i in enumerate(plan):
        mean = (40 + position) / 120 * 3
        gaps = sorted((abs(level - mean), level) for level in range(4) if left[level])
        if len(gaps) == 1 or gaps[1][0] - gaps[0][0] > 0.01:  # of two that are equally near either may come
            assert i // 10 == gaps[0][1]
        left[i // 10] -= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3, "epochs": 3}, r"epoch is 3: give 0 to 2"),
        ({"n_levels": 0}, r"give 1 to 4, the number of selected samples"),
        ({"n_levels": 5}, r"give 1 to 4, the number of selected samples"),
        ({"width": 0.0}, "width 0.0: give numbers above 0"),
        ({"exponent": -1.0}, "exponent is -1.0 and"),
    ],
)
def test_gaussian_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        gaussian_curriculum(range(4), [0.1, 0.2, 0.3, 0.4], **{"epoch": 0, "epochs": 3, **options})


@pytest.mark.parametrize(
    "order",
    [
        hard_to_easy_curriculum,
        lambda ids, rewards: target_curriculum(ids, rewards, 0.5),
        lambda ids, rewards: gaussian_curriculum(ids, rewards, epoch=0, epochs=1),
    ],
    ids=["hard to easy", "target", "gaussian"],
)
@pytest.mark.parametrize(
    ("ids", "rewards", "message"),
    [
        ([1, 2, 1], [0.1, 0.2, 0.3], "sample_id 1 occurs more than once"),
        ([1, 2], [0.1, math.nan], "reward of sample_id 2 is NaN"),
        ([1, 2], [0.1], "one per sample_id"),
        ([], [], "the selection is empty"),
    ],
)
def test_bad_input_of_the_rivals(order, ids, rewards, message):
    with pytest.raises(InputError, match=message):
        order(ids, rewards)


@pytest.mark.parametrize(("ids", "message"), [([3, 3], "sample_id 3 occurs more than once"), ([], "is empty")])
def test_bad_input_of_the_shuffle(ids, message):
    with pytest.raises(InputError, match=message):
        shuffled_curriculum(ids)
