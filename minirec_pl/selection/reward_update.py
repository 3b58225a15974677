"""How new rewards change what the store holds of a sample."""

from __future__ import annotations

import torch
from torch import Tensor


def take_rewards(data: dict[str, Tensor], rows: Tensor, group: Tensor, *, decay: float, solve_threshold: float) -> None:
    """Replaces the rewards of samples, or moves them where the group has another size than the last one.

    With keep = decay if the sizes differ, else 0, the mean becomes keep * old + (1 - keep) * new, the standard
    deviation that of the mixture of both groups with these weights, and the solve share moves like the mean.

    Args:
        data: arrays [N] `reward_mean`, `reward_std`, `solve_share`, `n_rollouts` and, once there are any, `rewards`
            [N, G], changed in place.
        rows: [n] int64, distinct.
        group: [n, G] float, the new rewards.
        decay: in [0, 1]; 0 always replaces.
        solve_threshold: a reward above it has solved the sample.
    """
    if not len(rows):
        return
    size = group.shape[1]
    exact = group.double()
    flat = exact.amax(dim=1) == exact.amin(dim=1)
    new_mean = exact.mean(dim=1).where(~flat, exact[:, 0])  # so that a flat group has no rounding in it
    new_std = exact.std(dim=1, correction=0).where(~flat, torch.zeros((), dtype=torch.float64))
    new_share = (exact > solve_threshold).double().mean(dim=1)

    mean, std, share, count = (data[name] for name in ("reward_mean", "reward_std", "solve_share", "n_rollouts"))
    keep = torch.full((len(rows),), decay, dtype=torch.float64)
    keep[(count[rows] == size) | (count[rows] == 0)] = 0.0
    old_mean, old_std, old_share = (old[rows].nan_to_num() for old in (mean, std, share))
    moved = keep * old_mean + (1 - keep) * new_mean
    spread = keep * (old_std**2 + (old_mean - moved) ** 2) + (1 - keep) * (new_std**2 + (new_mean - moved) ** 2)
    mean[rows] = moved
    std[rows] = spread.sqrt().where(keep > 0, new_std)
    share[rows] = keep * old_share + (1 - keep) * new_share
    count[rows] = size

    n = len(mean)
    kept = data.get("rewards", torch.empty(n, 0, dtype=torch.float32))
    if kept.shape[1] < size:
        kept = torch.cat([kept, torch.full((n, size - kept.shape[1]), torch.nan, dtype=torch.float32)], dim=1)
    kept[rows] = torch.nan
    kept[rows, :size] = group.float()
    data["rewards"] = kept
