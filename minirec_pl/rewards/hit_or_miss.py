"""Rewards that know only whether a rollout is the target, so that their expectation follows from its probability."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from minirec_pl.rewards.calls import Rewarder, RewardFunction, reward_name
from minirec_pl.utils.errors import InputError

_Reward = TypeVar("_Reward", bound=Callable[..., object])


class HitValues(NamedTuple):
    """The reward of a rollout that is the target, and of one that is not."""

    hit: float = 1.0
    miss: float = 0.0


def hit_or_miss(hit: float = 1.0, miss: float = 0.0) -> Callable[[_Reward], _Reward]:
    """Declares that a reward is a function of hit or miss alone, for `GRPORecModule(rollouts="expected")`.

    Args:
        hit: the reward of a rollout that is the target.
        miss: the reward of any other.

    Raises:
        InputError: if one of them is not finite.

    Example:
        >>> @hit_or_miss(hit=1.0, miss=-0.1)
        ... def strict(completions, target):
        ...     return [1.0 if c == t else -0.1 for c, t in zip(completions, target)]
        >>> strict.hit_values
        HitValues(hit=1.0, miss=-0.1)
    """
    if not (math.isfinite(hit) and math.isfinite(miss)):
        raise InputError(f"hit_or_miss has hit={hit} and miss={miss}: give finite numbers")

    def declare(reward: _Reward) -> _Reward:
        reward.hit_values = HitValues(float(hit), float(miss))  # type: ignore[attr-defined]
        return reward

    return declare


def hit_values(fns: Sequence[RewardFunction], weights: Sequence[float] | None) -> HitValues:
    """Sums what rewards declare of hit and miss.

    Args:
        fns: rewards, each with the attribute `hit_values`, see `hit_or_miss`.
        weights: one per reward; None weighs each with 1.

    Raises:
        InputError: naming a reward that declares nothing.
    """
    total = HitValues(0.0, 0.0)
    for fn, weight in zip(fns, [1.0] * len(fns) if weights is None else weights, strict=True):
        values = getattr(_unwrapped(fn), "hit_values", None)
        if values is None:
            raise InputError(
                f"reward {reward_name(fn)} is not declared a function of hit or miss, whose expectation is known: set "
                "rollouts to sample, take minirec_pl.rewards.hit, or declare it with minirec_pl.rewards.hit_or_miss"
            )
        total = HitValues(total.hit + weight * values.hit, total.miss + weight * values.miss)
    return total


def is_hit_or_miss(fn: RewardFunction) -> bool:
    """Whether a reward is declared a function of hit or miss, see `hit_or_miss`."""
    return hasattr(_unwrapped(fn), "hit_values")


def _unwrapped(fn: RewardFunction) -> RewardFunction:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def check_hit_values(rewarder: Rewarder, batch: Mapping[str, Tensor]) -> None:
    """Calls rewards on the targets of a batch and on other items, and compares with what they declare.

    Raises:
        InputError: naming a reward that gives something else.
    """
    target = batch["target"]
    items = torch.stack([target, (target + 1) % len(rewarder.item_ids)], dim=1)
    _, by_name = rewarder(batch, items, torch.zeros(items.shape, device=items.device))
    for (name, given), fn in zip(by_name.items(), rewarder.fns, strict=True):
        declared: HitValues = _unwrapped(fn).hit_values  # type: ignore[attr-defined]
        for column, (kind, value) in enumerate(declared._asdict().items()):
            wrong = (given[:, column] - value).abs() > 1e-6 * max(1.0, abs(value))
            wrong = wrong | given[:, column].isnan()
            if len(rewarder.item_ids) > 1 and bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise InputError(
                    f"reward {name} declares {value:g} for a {kind} and gave {float(given[row, column]):g} for "
                    f"sample_id {int(batch['sample_id'][row])}: declare what it gives, or set rollouts to sample"
                )
