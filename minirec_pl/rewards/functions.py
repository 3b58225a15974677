"""Reward functions of recommendation, for the option `rewards`; how they are called: `minirec_pl.rewards.calls`.

A completion is what the policy recommends: an external item id, a ranked list of them, or text. In YAML a function is
named by its dotted path, a class with `class_path` and `init_args`.
"""

import math
import re
from collections.abc import Sequence

from minirec_pl.rewards.hit_or_miss import HitValues, hit_or_miss
from minirec_pl.utils.errors import InputError

Completion = str | Sequence[str]
Ranks = Sequence[int | None]


@hit_or_miss()
def hit(completions: Sequence[Completion], target: Sequence[str]) -> list[float]:
    """Rewards 1 where the recommended item is the target or the recommended list holds it, else 0.

    Args:
        completions: [n] external item ids, or lists of them.
        target: [n] external item ids.

    Returns:
        [n] rewards.

    Example:
        >>> hit(["50", ["7", "8"]], target=["50", "8"])
        [1.0, 1.0]
    """
    return [
        float(completion == wanted if isinstance(completion, str) else wanted in completion)
        for completion, wanted in zip(completions, target, strict=True)
    ]


class NDCGReward:
    """Rewards NDCG@k of one relevant item: 1 / log2(rank + 1) where the target's rank is at most k, else 0.

    The rank is the target's place in a completion that is a list, or, with a policy that ranks the whole catalogue for
    each rollout, in that ranking (column `target_rank`).

    Args:
        k: length of the list, in items.

    Raises:
        InputError: if `k` is below 1.

    Example:
        >>> NDCGReward(k=3)([["7", "50"], ["50", "7"], ["1", "2"]], target=["50", "50", "50"])
        [0.6309297535714575, 1.0, 0.0]
    """

    hit_values = HitValues()  # of a completion that is one item

    def __init__(self, k: int = 10) -> None:
        self.k = _at_least_one(k)
        self.__name__ = f"ndcg@{k}"

    def __call__(
        self, completions: Sequence[Completion], target: Sequence[str], target_rank: Ranks | None = None
    ) -> list[float]:
        """Returns rewards [n] of completions [n]; `target_rank` [n] is from 1, None for an item that is not ranked."""
        return [_gain(rank, self.k) for rank in _ranks(completions, target, target_rank)]


class ReciprocalRankReward:
    """Rewards 1 / rank of the target where it is at most k, else 0; the rank is that of `NDCGReward`.

    Args:
        k: length of the list, in items.

    Raises:
        InputError: if `k` is below 1.

    Example:
        >>> ReciprocalRankReward()([["7", "50"], "50", "7"], target=["50", "50", "50"])
        [0.5, 1.0, 0.0]
    """

    hit_values = HitValues()  # of a completion that is one item

    def __init__(self, k: int = 10) -> None:
        self.k = _at_least_one(k)
        self.__name__ = f"reciprocal_rank@{k}"

    def __call__(
        self, completions: Sequence[Completion], target: Sequence[str], target_rank: Ranks | None = None
    ) -> list[float]:
        """Returns rewards [n] of completions [n], see `NDCGReward`."""
        ranks = _ranks(completions, target, target_rank)
        return [0.0 if rank is None or rank > self.k else 1 / rank for rank in ranks]


class SoftmaxMixReward:
    """Rewards w NDCG@k + (1 - w) p, as MiniRec's retrieval setting (arXiv 2602.04278) does.

    p is the softmax probability of the target over the catalogue. Both come from a policy that scores the catalogue
    anew for each rollout; one that generates items has the same scores for all rollouts of a prompt, and is refused.

    Args:
        k: cut-off of NDCG, in items.
        weight: w, of the NDCG, from 0 to 1; the softmax probability of the target has the rest.

    Raises:
        InputError: if an option is out of range.

    Example:
        >>> SoftmaxMixReward()(target_rank=[1, None], target_probability=[0.5, 0.0])
        [0.975, 0.0]
    """

    def __init__(self, k: int = 1000, weight: float = 0.95) -> None:
        if not 0 <= weight <= 1:
            raise InputError(f"weight is {weight}: give the share of NDCG in the reward, from 0 to 1")
        self.k, self.weight = _at_least_one(k), weight
        self.__name__ = "softmax_mix"

    def __call__(self, target_rank: Ranks, target_probability: Sequence[float]) -> list[float]:
        """Returns rewards [n] from the target's rank, from 1, and its probability."""
        mix = zip(target_rank, target_probability, strict=True)
        return [self.weight * _gain(rank, self.k) + (1 - self.weight) * p for rank, p in mix]


def rank_penalty(
    completions: Sequence[str], target: Sequence[str], group: Sequence[int], logp: Sequence[float]
) -> list[float]:
    """Penalises likely mistakes as ReRe (arXiv 2510.12211) does; to be added to `hit`.

    In a group of G rollouts in which the target was found, a wrong item gets

        -(1 / log2(rho + 1)) / sum_{j=1..G} 1 / log2(j + 1)

    rho being the place of its log-probability among the rollouts (1 for the most likely; the same item drawn twice has
    one place). The target gets 0, and so does all of a group without it, as in the authors' code.

    Args:
        completions: [n] external item ids, group after group.
        target: [n] external item ids.
        group: [n], the same number throughout a group.
        logp: [n], log-probabilities of the completions.

    Returns:
        [n] rewards, at most 0.

    Example:
        >>> rank_penalty(["7", "50"], ["50", "50"], group=[0, 0], logp=[-1.0, -2.0])
        [-0.6131471927654584, 0.0]
    """
    members: dict[int, list[int]] = {}
    for n, number in enumerate(group):
        members.setdefault(number, []).append(n)
    rewards = [0.0] * len(completions)
    for rows in members.values():
        if not any(completions[n] == target[n] for n in rows):
            continue
        places = dict(reversed([(completions[n], logp[n]) for n in rows]))
        total = sum(1 / math.log2(j + 1) for j in range(1, len(rows) + 1))
        for n in rows:
            if completions[n] != target[n]:
                rho = 1 + sum(places[completions[m]] > places[completions[n]] for m in rows)
                rewards[n] = -1 / math.log2(rho + 1) / total
    return rewards


class FormatReward:
    """Rewards 1 where the whole text matches a regular expression (`.` matches line breaks too), else 0.

    Args:
        pattern: regular expression, for example `<think>.*</think><answer>.*</answer>`.

    Raises:
        InputError: if it is not a regular expression.

    Example:
        >>> FormatReward("<answer>.*</answer>")(["<answer>50</answer>", "50"])
        [1.0, 0.0]
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise InputError(f"pattern {pattern!r} is not a regular expression ({error}): fix it") from error
        self.__name__ = "format"

    def __call__(self, completions: Sequence[str]) -> list[float]:
        """Returns rewards [n] of texts [n]."""
        return [float(self.pattern.fullmatch(text) is not None) for text in completions]


def _at_least_one(k: int) -> int:
    if k < 1:
        raise InputError(f"k is {k}: give at least 1, the length of the list")
    return k


def _gain(rank: int | None, k: int) -> float:
    return 0.0 if rank is None or rank > k else 1 / math.log2(rank + 1)


def _ranks(completions: Sequence[Completion], target: Sequence[str], target_rank: Ranks | None) -> Ranks:
    if target_rank is not None:
        return target_rank
    ranks: list[int | None] = []
    for completion, wanted in zip(completions, target, strict=True):
        items = [completion] if isinstance(completion, str) else list(completion)
        ranks.append(items.index(wanted) + 1 if wanted in items else None)
    return ranks
