"""Learnability: how near a sample's difficulty is to the point where a policy learns most."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minirec_pl.selection.expected_update import expected_update, group_moments
from minirec_pl.selection.signals import Array
from minirec_pl.utils.errors import InputError, check_whole

_FLAT = 1e-12  # a spread below this share of the largest magnitude is rounding, not information
_IQR_OF_UNIT_NORMAL = 1.3489795003921634


def min_max(values: Tensor) -> Tensor:
    """Scales values to [0, 1]; where all are equal, each becomes 0.5.

    Args:
        values: [N] float64.

    Returns:
        [N] float64.
    """
    if not len(values):
        return values
    low, high = values.min(), values.max()
    if high - low <= _FLAT * torch.maximum(low.abs(), high.abs()):
        return torch.full_like(values, 0.5)
    return (values - low) / (high - low)


def group_difficulty(solve_probability: Array, num_generations: int) -> Tensor:
    """Returns the probability that at least one rollout of a group solves the sample.

    q = 1 - (1 - p)^G, computed through log1p and expm1, so that a p of 1e-12 is not lost.

    Args:
        solve_probability: [N] float in [0, 1], the probability p that one rollout solves the sample.
        num_generations: Rollouts in a group, G.

    Returns:
        [N] float64 in [0, 1]; NaN stays NaN.

    Raises:
        InputError: If `num_generations` is below 1 or a probability is outside [0, 1].
    """
    check_whole(num_generations=num_generations)
    if num_generations < 1:
        raise InputError(f"num_generations is {num_generations}: give at least 1")
    p = torch.as_tensor(solve_probability).detach().to("cpu", torch.float64)
    if ((p < 0) | (p > 1)).any():
        raise InputError("solve_probability has a value outside [0, 1]: give probabilities")
    return -torch.expm1(num_generations * torch.log1p(-p))


def quantile_calibration(difficulty: Array, gate: tuple[float, float]) -> tuple[float, float | None]:
    """Takes centre and width of the learnability curve from the pool itself (ours, not the paper's).

    mu is the median and sigma the interquartile range / 1.349 (the standard deviation, if these values were normal) of
    the difficulties within the gate, so that a crowd of hopeless or solved samples does not move them.

    Args:
        difficulty: [N] float.
        gate: (low, high), both inclusive.

    Returns:
        mu and sigma; sigma is None, the default of `learnability`, where the values within the gate do not spread.

    Raises:
        InputError: If no difficulty lies within the gate.
    """
    values = torch.as_tensor(difficulty).detach().to("cpu", torch.float64)
    inside = values[(values >= gate[0]) & (values <= gate[1])]
    if not len(inside):
        raise InputError(f"calibrate='quantile' finds no difficulty within gate={list(gate)}: widen the gate")
    q25, q50, q75 = torch.quantile(inside, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    sigma = (q75 - q25) / _IQR_OF_UNIT_NORMAL or float(inside.std(correction=0))
    return q50, sigma or None


def learnability(rewards: Array, *, mu: float = 0.5, sigma: float | None = None, normalize: bool = True) -> Tensor:
    """Computes the learnability of samples, a Gaussian around the difficulty at which a policy learns most.

    L_i = exp(-(r_i - mu)^2 / (2 sigma^2)), then min-max to [0, 1] (MiniRec, arXiv 2602.04278). Rewards that are all
    equal separate nothing: L is 1 for each unless sigma is given, and min-max turns any constant L into 0.5.

    Args:
        rewards: [N] float, a difficulty (mean reward) per sample, or [N, G], the rewards of each group.
        mu: Difficulty of the highest learnability, in units of reward.
        sigma: Width, in units of reward; None takes the population standard deviation of r.
        normalize: Whether to scale to [0, 1] over the N samples.

    Returns:
        [N] float64.

    Raises:
        InputError: If rewards are NaN or infinite, have another shape, mu is not finite, or sigma is not positive.

    Example:
        >>> learnability(torch.tensor([0.0, 0.5, 1.0])).tolist()
        [0.0, 1.0, 0.0]
    """
    r = torch.as_tensor(rewards).detach().to("cpu", torch.float64)
    if r.ndim not in (1, 2) or (r.ndim == 2 and r.shape[1] == 0):
        raise InputError(f"rewards have the shape {list(r.shape)}: give [N] or [N, G]")
    finite = torch.isfinite(r) if r.ndim == 1 else torch.isfinite(r).all(dim=1)
    if not finite.all():
        raise InputError(f"rewards are NaN or infinite in row {int((~finite).nonzero()[0])}: fix the reward function")
    if not math.isfinite(mu):
        raise InputError(f"mu is {mu}: give a finite number")
    if sigma is not None and not sigma > 0:
        raise InputError(f"sigma is {sigma}: give a number above 0")
    if r.ndim == 2:
        r = r.mean(dim=1)
    if not len(r):
        return r
    if sigma is None:
        flat = bool(r.max() - r.min() <= _FLAT * r.abs().max())
        sigma = 0.0 if flat else float(r.std(correction=0))
        if sigma == 0:
            return min_max(torch.ones_like(r)) if normalize else torch.ones_like(r)
    away = (r - mu).abs()
    if not normalize:
        return torch.exp(-((away / sigma) ** 2) / 2)
    nearest = away.min()  # L relative to the largest: the factor cancels, and no tiny L underflows
    return min_max(torch.exp(-((away - nearest) / sigma) * ((away + nearest) / sigma) / 2))


def update_learnability(
    solve_probability: Array,
    num_generations: int,
    *,
    scale_rewards: str = "group",
    baseline: str = "mean",
    lengths: Array | None = None,
) -> Tensor:
    """Computes the size of a sample's expected GRPO update for a hit reward, relative to the largest (ours).

    L_i = w_G(p_i) p_i (1 - p_i), see `minirec_pl.selection.group_moments`: a sample's expected update is
    w_G(p) p grad log p, and the length of grad log p goes as 1 - p. It is (G - 1) / G of the expected deviation within
    a group where rewards are divided by that, p (1 - p) for `none` with `leave_one_out`, and
    (1 - p) (1 - (1 - p)^(G - 1)) for `mean`. With `lengths` it is w_G(p_i) times the measured length of grad p.

    Args:
        solve_probability: [N] float in [0, 1], the probability p that one rollout solves the sample.
        num_generations: Rollouts in a group, G, at least 2.
        scale_rewards: `group`, `none` or `mean`.
        baseline: `mean` or `leave_one_out`.
        lengths: [N] float, |grad p| of each sample; None takes p (1 - p).

    Returns:
        [N] float64 in [0, 1]; 0 where p is 0 or 1, and for all where no sample has an update; NaN where p is.

    Raises:
        InputError: If an option is out of range or a probability is outside [0, 1].

    Example:
        >>> update_learnability(torch.tensor([0.0, 0.5, 1.0]), 8).tolist()
        [0.0, 1.0, 0.0]
    """
    p = torch.as_tensor(solve_probability).detach().to("cpu", torch.float64)
    if ((p < 0) | (p > 1)).any():
        raise InputError("solve_probability has a value outside [0, 1]: give probabilities")
    weight = group_moments(p.log(), num_generations, scale_rewards=scale_rewards, baseline=baseline).weight
    size = expected_update(p.log(), weight)
    nothing = size == 0
    if lengths is not None:
        size = weight * torch.as_tensor(lengths).detach().to("cpu", torch.float64)
    size = size.masked_fill(nothing, 0.0)
    largest = size.nan_to_num(nan=0.0).max() if len(size) else size.new_zeros(())
    return size / largest if largest > 0 else size
