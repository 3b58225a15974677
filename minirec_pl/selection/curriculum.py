"""The easy-to-hard order of an epoch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from minirec_pl.errors import InputError
from minirec_pl.selection.signals import Array, as_ids, name_ids, repeated_ids

_SAMPLES_PER_FOLD = 64


def default_folds(n_samples: int) -> int:
    """Number of folds of a plan: one per 64 samples, K = max(1, n // 64)."""
    return max(1, n_samples // _SAMPLES_PER_FOLD)


def fold_starts(n_samples: int, n_folds: int) -> list[int]:
    """Position in the plan at which each fold starts.

    Args:
        n_samples: Samples in the plan, n.
        n_folds: Number of folds, K; all have floor(n / K) samples, the last also the rest.

    Returns:
        [K] ascending, the first is 0.

    Raises:
        InputError: If `n_folds` is not in 1..n.
    """
    if not 1 <= n_folds <= n_samples:
        raise InputError(f"n_folds must lie in 1..{n_samples}, the number of selected samples, not {n_folds}.")
    return [fold * (n_samples // n_folds) for fold in range(n_folds)]


def fold_curriculum(
    sample_ids: Array | Sequence[int], rewards: Array | Sequence[float], n_folds: int, *, seed: int = 42
) -> list[int]:
    """Orders samples from easy to hard within each of several random folds (MiniRec, arXiv 2602.04278).

    Sorts the ids, shuffles them with `random.Random(seed).shuffle`, cuts them into K contiguous folds of floor(n / K)
    (the last takes the rest), sorts each fold by mean reward, highest first (stable), and joins the folds.

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
    ids = as_ids(sample_ids)
    easiness = torch.as_tensor(rewards).detach().to("cpu", torch.float64)
    if easiness.shape != ids.shape:
        raise InputError(f"rewards must have the shape [{len(ids)}], one per sample_id, not {list(easiness.shape)}.")
    if not torch.isfinite(easiness).all():
        raise InputError(f"the reward of sample_id {name_ids(ids[~torch.isfinite(easiness)])} is NaN or infinite.")
    if len(repeated := repeated_ids(ids)):
        raise InputError(f"sample_id {name_ids(repeated)} occurs more than once in the selection.")
    reward_of = dict(zip(ids.tolist(), easiness.tolist(), strict=True))
    starts = fold_starts(len(ids), n_folds)
    shuffled = sorted(reward_of)
    random.Random(seed).shuffle(shuffled)
    plan: list[int] = []
    for start, end in zip(starts, [*starts[1:], len(shuffled)], strict=True):
        plan += sorted(shuffled[start:end], key=reward_of.__getitem__, reverse=True)
    return plan
