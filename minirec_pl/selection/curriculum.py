"""The order of an epoch: MiniRec's easy-to-hard folds, and the curricula it is compared with."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minirec_pl.selection.signals import Array, as_ids, name_ids, repeated_ids
from minirec_pl.utils.errors import InputError

_SAMPLES_PER_FOLD = 64


def default_folds(n_samples: int) -> int:
    """Returns the number of folds of a plan: one per 64 samples, K = max(1, n // 64)."""
    return max(1, n_samples // _SAMPLES_PER_FOLD)


def fold_starts(n_samples: int, n_folds: int) -> list[int]:
    """Returns the positions in the plan at which the folds start.

    Args:
        n_samples: Samples in the plan, n.
        n_folds: Number of folds, K; all have floor(n / K) samples, the last also the rest.

    Returns:
        [K] ascending, the first is 0.

    Raises:
        InputError: If `n_folds` is not in 1..n.
    """
    if not 1 <= n_folds <= n_samples:
        raise InputError(f"n_folds is {n_folds}: give 1 to {n_samples}, the number of selected samples")
    return [fold * (n_samples // n_folds) for fold in range(n_folds)]


def fold_curriculum(
    sample_ids: Array | Sequence[int], rewards: Array | Sequence[float], n_folds: int, *, seed: int = 42
) -> list[int]:
    """Orders samples from easy to hard within each of several random folds (MiniRec, arXiv 2602.04278).

    Sorts the ids, shuffles them with `random.Random(seed).shuffle`, cuts them into K contiguous folds of floor(n / K)
    (the last takes the rest), sorts each fold by mean reward, highest first (stable), and joins the folds. One fold is
    the global easy-to-hard order.

    Args:
        sample_ids: [n] distinct.
        rewards: [n] float, the mean reward of each; any easiness will do.
        n_folds: Number of folds, K; `default_folds(n)` is the usual one.
        seed: Seed of the shuffle.

    Returns:
        [n] the same ids, in the order to train on.

    Raises:
        InputError: If ids repeat, a reward is NaN or infinite, lengths differ, or K is not in 1..n.

    Example:
        >>> fold_curriculum([3, 1, 2], [0.1, 0.9, 0.5], n_folds=1)
        [1, 2, 3]
    """
    reward_of = _reward_of(sample_ids, rewards)
    starts = fold_starts(len(reward_of), n_folds)
    shuffled = shuffled_curriculum(list(reward_of), seed=seed)
    plan: list[int] = []
    for start, end in zip(starts, [*starts[1:], len(shuffled)], strict=True):
        plan += sorted(shuffled[start:end], key=reward_of.__getitem__, reverse=True)
    return plan


def shuffled_curriculum(sample_ids: Array | Sequence[int], *, seed: int | str = 42) -> list[int]:
    """Orders samples at random, whatever their order in the input.

    Args:
        sample_ids: [n] distinct.
        seed: Seed of `random.Random`; a string such as f"{seed}-{epoch}" gives each epoch its own order.

    Returns:
        [n] the same ids, shuffled.

    Raises:
        InputError: If ids repeat or there are none.
    """
    plan = sorted(_distinct(sample_ids).tolist())
    random.Random(seed).shuffle(plan)
    return plan


def hard_to_easy_curriculum(
    sample_ids: Array | Sequence[int], rewards: Array | Sequence[float], *, seed: int = 42
) -> list[int]:
    """Orders samples from hard to easy: lowest mean reward first, ties in a seeded random order.

    The global easy-to-hard order is `fold_curriculum` with one fold.

    Args:
        sample_ids: [n] distinct.
        rewards: [n] float, the mean reward of each; any easiness will do.
        seed: Seed of the order of ties.

    Returns:
        [n] the same ids, in the order to train on.

    Raises:
        InputError: As `fold_curriculum`.
    """
    reward_of = _reward_of(sample_ids, rewards)
    return sorted(shuffled_curriculum(list(reward_of), seed=seed), key=reward_of.__getitem__)


def move_target(
    target: float,
    mean_reward: float,
    *,
    step_size: float = 0.5,
    sensitivity: float = 2.0,
    target_reward: float = 0.5,
) -> float:
    """Moves the target difficulty by the mean reward, as AdaRFT does (arXiv 2504.05520).

    T' = clip(T + eta tanh(alpha (R - beta)), 0, 1): harder while the policy earns more than beta, easier while it earns
    less. Theirs has difficulties of 0 to 100 and eta = 50; here they are 0 to 1.

    Args:
        target: Target difficulty T in [0, 1], 0 easiest.
        mean_reward: Mean training reward R since the last move.
        step_size: eta, in units of difficulty.
        sensitivity: alpha, per unit of reward.
        target_reward: beta, the reward at which T stays.

    Returns:
        T'.
    """
    moved = target + step_size * math.tanh(sensitivity * (mean_reward - target_reward))
    return min(max(moved, 0.0), 1.0)


def target_curriculum(
    sample_ids: Array | Sequence[int], rewards: Array | Sequence[float], target: float, *, seed: int = 42
) -> list[int]:
    """Orders samples by how near their difficulty is to a target, nearest first (AdaRFT, arXiv 2504.05520).

    |d_i - T| ascending with d = 1 - mean reward, ties in a seeded random order. How ours differs: theirs takes the B
    nearest at every step and then moves T (`move_target`), so that a sample may come again; here the order is that of a
    whole epoch, in which each sample comes once, and T moves between epochs.

    Args:
        sample_ids: [n] distinct.
        rewards: [n] float, the mean reward or solve probability of each.
        target: Target difficulty T.
        seed: Seed of the order of ties.

    Returns:
        [n] the same ids, in the order to train on.

    Raises:
        InputError: As `fold_curriculum`.
    """
    reward_of = _reward_of(sample_ids, rewards)
    return sorted(shuffled_curriculum(list(reward_of), seed=seed), key=lambda one: abs(1 - reward_of[one] - target))


def gaussian_curriculum(
    sample_ids: Array | Sequence[int],
    rewards: Array | Sequence[float],
    *,
    epoch: int,
    epochs: int,
    n_levels: int = 4,
    exponent: float = 0.5,
    width: float = 0.5,
    seed: int = 42,
) -> list[int]:
    """Draws samples by level of difficulty, mostly easy ones first and hard ones later (E2H, arXiv 2506.06632).

    At progress t / T of the training, a sample of level k in 0..K-1 is drawn with the probability P(k) proportional to
    exp(-(k - mu)^2 / (2 sigma^2)), mu = (t / T)^beta (K - 1). How ours differs: the levels are K equal parts of the
    selection by mean reward instead of labels of the data; and the draws of an epoch are without replacement, so
    P(k) is spread over the levels that have samples left and each sample comes once.

    Args:
        sample_ids: [n] distinct.
        rewards: [n] float, the mean reward of each; any easiness will do.
        epoch: The epoch to plan; its position i has the progress t / T = (epoch + i / n) / epochs.
        epochs: Epochs of the training.
        n_levels: Number K of levels, 1..n.
        exponent: beta, below 1 to leave the easy levels sooner; published are 0.25 and 0.5.
        width: sigma, in levels; published are 0.75 and 0.5.
        seed: Seed of the draws; each epoch has its own.

    Returns:
        [n] the same ids, in the order to train on.

    Raises:
        InputError: As `fold_curriculum`, or if an option is out of range.
    """
    if not 0 <= epoch < epochs:
        raise InputError(f"epoch is {epoch}: give 0 to {epochs - 1}, an epoch of the training")
    if not (exponent > 0 and width > 0):
        raise InputError(f"exponent is {exponent} and width {width}: give numbers above 0")
    by_ease = fold_curriculum(sample_ids, rewards, 1, seed=seed)
    n = len(by_ease)
    if not 1 <= n_levels <= n:
        raise InputError(f"n_levels is {n_levels}: give 1 to {n}, the number of selected samples")
    random_numbers = np.random.default_rng([seed, epoch])
    queues = [random_numbers.permutation(level).tolist() for level in np.array_split(np.array(by_ease), n_levels)]
    mean = ((epoch + np.arange(n) / n) / epochs) ** exponent * (n_levels - 1)
    log_chance = -((np.arange(n_levels) - mean[:, None]) ** 2) / (2 * width**2)
    keys = (log_chance + random_numbers.gumbel(size=(n, n_levels))).tolist()  # their argmax draws from P
    plan: list[int] = []
    for key in keys:
        level = max((k for k in range(n_levels) if queues[k]), key=key.__getitem__)
        plan.append(queues[level].pop())
    return plan


def _distinct(sample_ids: Array | Sequence[int]) -> Tensor:
    ids = as_ids(sample_ids)
    if not len(ids):
        raise InputError("the selection is empty: give at least one sample to order")
    if len(repeated := repeated_ids(ids)):
        raise InputError(f"sample_id {name_ids(repeated)} occurs more than once in the selection: give each once")
    return ids


def _reward_of(sample_ids: Array | Sequence[int], rewards: Array | Sequence[float]) -> dict[int, float]:
    ids = _distinct(sample_ids)
    easiness = torch.as_tensor(rewards).detach().to("cpu", torch.float64)
    if easiness.shape != ids.shape:
        raise InputError(f"rewards have the shape {list(easiness.shape)}: give [{len(ids)}], one per sample_id")
    if not torch.isfinite(easiness).all():
        bad = name_ids(ids[~torch.isfinite(easiness)])
        raise InputError(f"the reward of sample_id {bad} is NaN or infinite: fix the reward function")
    return dict(zip(ids.tolist(), easiness.tolist(), strict=True))
