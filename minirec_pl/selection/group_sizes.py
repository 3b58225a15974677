"""How many rollouts the group of a sample needs, by its solve probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minirec_pl.selection.signals import Signals
from minirec_pl.utils.errors import InputError, check_whole

_EXPLORED = 0.05  # of the samples that would need more rollouts than allowed


@dataclass(frozen=True)
class AdaptiveGenerations:
    """Groups that are as large as a sample needs.

    G rollouts of a sample that one rollout solves with the probability p are mixed, some of them solving it and some
    not, with the probability 1 - p^G - (1 - p)^G. The sample gets the smallest G in 2..`max` for which this is at least
    `q`. For rewards of hit or miss.

    Args:
        q: probability above 0 and below 1 that a group is mixed.
        max: rollouts of a group at most, at least 2. Samples that would need more are left out of an epoch, but for 5 %
            of them, drawn anew each epoch, which get `num_generations`.

    Raises:
        InputError: if a number is out of range.
    """

    q: float = 0.8
    max: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.q < 1:
            raise InputError(
                f"adaptive_generations.q is {self.q}: it is the probability that a group is mixed, so give a number "
                "above 0 and below 1"
            )
        check_whole(**{"adaptive_generations.max": self.max})
        if self.max < 2:
            raise InputError(f"adaptive_generations.max is {self.max}: a group has at least 2 rollouts")


def generations_needed(chance: Tensor, q: float, most: int) -> Tensor:
    """Finds the smallest G in 2..most with 1 - p^G - (1 - p)^G >= q.

    Args:
        chance: [N] float, p in [0, 1].
        q: in (0, 1).
        most: at least 2.

    Returns:
        [N] int64, 0 where there is none.

    Example:
        >>> generations_needed(torch.tensor([0.5, 0.1, 0.001]), q=0.8, most=64).tolist()
        [4, 16, 0]
    """
    hit = chance.double()
    miss = 1 - hit
    all_hit, all_miss, needed = hit.clone(), miss.clone(), torch.zeros(hit.shape, dtype=torch.int64)
    for size in range(2, most + 1):
        all_hit, all_miss = all_hit * hit, all_miss * miss
        needed[(needed == 0) & (1 - all_hit - all_miss >= q)] = size
    return needed


@dataclass(frozen=True)
class GroupSizer:
    """Gives every sample of a pool the size of its group.

    Attributes:
        num_generations: of samples whose solve probability is not known, and of those that are explored.
        adaptive: the sizes of the others.
        by_target: whether solving a sample is to hit its target, so that the exact probability of that counts.
    """

    num_generations: int
    adaptive: AdaptiveGenerations
    by_target: bool = True

    def sizes(self, chance: Tensor, seed: int, epoch: int) -> Tensor:
        """Sizes the groups of an epoch.

        Args:
            chance: [N] float, solve probabilities of the pool, ascending by sample_id, NaN where not known.
            seed: with `epoch` decides which of the samples that need more rollouts than allowed are explored.
            epoch: the coming epoch.

        Returns:
            [N] int64, 0 for samples to be left out.
        """
        known = ~chance.isnan()
        needed = generations_needed(chance.nan_to_num(nan=0.5), self.adaptive.q, self.adaptive.max)
        explored = torch.from_numpy(np.random.default_rng([seed, epoch]).random(len(chance)) < _EXPLORED)
        needed[~known | ((needed == 0) & explored)] = self.num_generations
        return needed


def met_chance(signals: Signals, *, by_target: bool = True) -> Tensor:
    """Returns the probability that one rollout solves a sample, as far as it was met in scoring or training.

    It is exact where the policy gives it; else (hits + 1/2) / (n + 1) of the last n rollouts, the mean under Jeffreys'
    prior, since a few misses do not make a sample hopeless.

    Args:
        signals: of N samples.
        by_target: false leaves out the exact probability of the target.

    Returns:
        [N] float64, NaN where nothing is known.
    """
    share, exact = signals.solve_share, signals.solve_probability
    if share is None:
        met = torch.full((len(signals),), torch.nan, dtype=torch.float64)
    else:
        met = (share * signals.n_rollouts + 0.5) / (signals.n_rollouts + 1)
    return met if exact is None or not by_target else exact.where(~exact.isnan(), met)


@dataclass(frozen=True)
class GroupSizes:
    """The groups of one epoch.

    Attributes:
        sample_ids: [N] int64, of the pool, ascending.
        sizes: [N] int64, from `sizer`.
        sizer: made them.
    """

    sample_ids: Tensor
    sizes: Tensor
    sizer: GroupSizer

    def of(self, sample_ids: Tensor | Sequence[int]) -> Tensor:
        """Looks up the sizes of samples [n], 0 for those to be left out: int64 [n]."""
        ids = torch.as_tensor(sample_ids, dtype=torch.int64).cpu()
        return self.sizes[torch.searchsorted(self.sample_ids, ids)]

    def share_of_budget(self, sample_ids: Sequence[int], n_samples: int) -> float:
        """Returns the rollouts of samples as a share of those that `n_samples` groups of the usual size have."""
        return int(self.of(sample_ids).sum()) / (n_samples * self.sizer.num_generations)

    def within_budget(self, ranked: Sequence[int], n_samples: int) -> list[int]:
        """Takes samples as they come until they have as many rollouts as `n_samples` groups of the usual size.

        Those to be left out are passed over; the last group may exceed the budget.

        Args:
            ranked: sample_ids, best first.
            n_samples: the budget.

        Raises:
            InputError: if all are to be left out.
        """
        sizes = self.of(ranked)
        spent = sizes.cumsum(0) - sizes
        kept = (sizes > 0) & (spent < n_samples * self.sizer.num_generations)
        if not bool(kept.any()):
            raise InputError(
                f"each of the {len(ranked)} samples to train on needs more than adaptive_generations.max "
                f"({self.sizer.adaptive.max}) rollouts: raise it, lower adaptive_generations.q, or leave out "
                "adaptive_generations"
            )
        return [sample_id for sample_id, keep in zip(ranked, kept.tolist(), strict=True) if keep]
