"""What a group of rollouts is expected to teach, from the exact probability of the target and a reward of hit or miss.

K ~ Bin(G, p) of a group's G rollouts hit, f = K / G. A miss contributes the gradient of log(1 - p) on average, so the
expected on-policy GRPO gradient of a group, averaged over its rollouts, is w_G(p) grad p = w_G(p) p grad log p with

    w_G(p) = d E[f (1 - f) / D_K] / (p (1 - p))

d being what a hit earns more than a miss, and D_K what `scale_rewards` divides by in a group of K hits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minirec_pl.utils.errors import InputError, check_whole

SCALINGS, BASELINES = ("group", "none", "mean"), ("mean", "leave_one_out")
_ENTRIES = 2**22  # of the table over the hits of a group, at a time


class GroupMoments(NamedTuple):
    """What a group of rollouts is expected to be, each float64 of the shape of log p.

    Attributes:
        weight: w_G(p), what multiplies grad p.
        flat: probability that all rewards are equal, p^G + (1 - p)^G.
        deviation: expected sample deviation of the rewards.
    """

    weight: Tensor
    flat: Tensor
    deviation: Tensor


def group_moments(
    logp: Tensor,
    num_generations: int,
    *,
    scale_rewards: str = "group",
    baseline: str = "mean",
    hit: float = 1.0,
    miss: float = 0.0,
    eps: float = 1e-4,
) -> GroupMoments:
    """Computes w_G(p), whose product with grad p is the expectation of the GRPO gradient, and moments of a group.

    With hits of 1 and misses of 0:

    * `group`: sqrt((G - 1) / G) E[sqrt(f (1 - f))] / (p (1 - p)) as eps -> 0, with s + eps in the denominator exactly;
    * `none`: (G - 1) / G;
    * `mean` (MaxRL, arXiv 2602.02710): (1 - (1 - p)^(G - 1)) / p;

    and G / (G - 1) times that for `leave_one_out`. Everything is computed from log p, in float64.

    Args:
        logp: float [...], log-probability of the target in nats, at most 0.
        num_generations: G, at least 2.
        scale_rewards: `group`, `none` or `mean`, see `minirec_pl.grpo.group_advantages`.
        baseline: `mean` or `leave_one_out`.
        hit: reward of a rollout that is the target.
        miss: reward of any other.
        eps: added to the deviation, as in `group_advantages`.

    Raises:
        InputError: if G is below 2, an option is unknown, or `mean` meets a negative reward.

    Example:
        >>> group_moments(torch.tensor([0.5]).log(), 4, scale_rewards="none").weight
        tensor([0.7500], dtype=torch.float64)
    """
    _check(num_generations, scale_rewards, baseline, hit, miss)
    logp = logp.detach().double().clamp(max=0.0)
    hits = torch.arange(1, num_generations, dtype=torch.float64, device=logp.device)
    share, gain = hits / num_generations, hit - miss
    deviation = abs(gain) * (share * (1 - share) * (num_generations / (num_generations - 1))).sqrt()
    if scale_rewards == "group":
        divisor = deviation + eps
    elif scale_rewards == "mean":
        divisor = miss + gain * share
    else:
        divisor = torch.ones_like(share)
    slope = gain * share * (1 - share) / divisor if gain else torch.zeros_like(share)
    if baseline == "leave_one_out":
        slope = slope * (num_generations / (num_generations - 1))
    ways = math.lgamma(num_generations + 1) - torch.lgamma(hits + 1) - torch.lgamma(num_generations - hits + 1)
    parts = [
        _moments(rows, hits, num_generations, ways, slope, deviation)
        for rows in torch.split(logp.flatten(), max(1, _ENTRIES // len(hits)))
    ]
    weight, mixed = (torch.cat(column).view_as(logp) for column in zip(*parts, strict=True))
    log_miss = torch.log(-torch.expm1(logp))
    flat = (num_generations * logp).exp() + (num_generations * log_miss).exp()
    return GroupMoments(weight, flat, mixed)


def _moments(
    logp: Tensor, hits: Tensor, group: int, ways: Tensor, slope: Tensor, deviation: Tensor
) -> tuple[Tensor, Tensor]:
    """w_G(p) and the expected deviation, from the table [n, G - 1] of how many of a group hit.

    Both factors of p (1 - p) are taken out of the binomial probabilities, so that nothing is divided by them.
    """
    log_miss = torch.log(-torch.expm1(logp)).clamp(min=-1e4)[:, None]  # a finite bound: 0 * -inf is NaN
    table = (ways + (hits - 1) * logp[:, None].clamp(min=-1e4) + (group - hits - 1) * log_miss).exp()
    return table @ slope, (table @ deviation) * logp.exp() * -torch.expm1(logp)


def expected_update(logp: Tensor, weight: Tensor) -> Tensor:
    """Computes w_G(p) p (1 - p), the size of a sample's expected update: that of grad log p goes as 1 - p.

    Args:
        logp: float [...], log-probability of the target in nats.
        weight: w_G(p), same shape, see `group_moments`.

    Returns:
        float64, 0 for a p of 0 or 1.
    """
    logp = logp.double().clamp(max=0.0)
    return weight * logp.exp() * -torch.expm1(logp)


def _check(num_generations: int, scale_rewards: str, baseline: str, hit: float, miss: float) -> None:
    check_whole(num_generations=num_generations)
    if num_generations < 2:
        raise InputError(f"num_generations is {num_generations}: a group has at least 2 rollouts")
    if scale_rewards == "batch":
        raise InputError(
            "scale_rewards='batch' divides by the deviation of a whole batch, of which no expectation is known: use "
            "group, none or mean, or rollouts='sample'"
        )
    for name, value, choices in (("scale_rewards", scale_rewards, SCALINGS), ("baseline", baseline, BASELINES)):
        if value not in choices:
            raise InputError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
    if scale_rewards == "mean" and min(hit, miss) < 0:
        raise InputError(
            f"scale_rewards='mean' divides by the mean reward, and the rewards are {hit:g} for a hit and {miss:g} for "
            "a miss: use group or none, or rewards of at least 0"
        )
