"""Full-ranking figures of a test part with their standard errors, and popularity as the rival."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.samples import IntArray
from minirec_pl.metrics.ranking import target_rank
from minirec_pl.policy.interface import Policy
from minirec_pl.policy.returned import item_logps
from minirec_pl.utils.cost import Cost
from minirec_pl.utils.modules import evaluation_mode
from minirec_pl.utils.seeds import isolated_random_state

K = 10
FIGURES = (f"hit_rate@{K}", f"ndcg@{K}")
Row = dict[str, Any]


def gains(ranks: Tensor) -> npt.NDArray[np.float64]:
    """Computes NDCG@10 of each sample, float64 of the shape of `ranks` (integers, from 1)."""
    rank = ranks.numpy().astype(np.float64)
    return np.where(rank <= K, 1 / np.log2(1 + rank), 0.0)


def ranking_figures(ranks: Tensor, users: IntArray) -> dict[str, float | int]:
    """Computes HR@10 and NDCG@10 with their standard errors.

    Two errors of a mean m of n samples x_i: `_se`, sqrt(sum (x_i - m)^2 / (n (n - 1))), for which samples are
    independent; and `_se_users`, sqrt(U / (U - 1) sum_u (sum_{i of u} (x_i - m))^2) / n, for which the U users are and
    the samples of one user are not. They are equal where every user has one sample, and NaN of a single one.

    Args:
        ranks: int64 [n], rank of each sample's target, from 1.
        users: int64 [n], user index of each sample.

    Returns:
        `hit_rate@10`, `ndcg@10`, each again with `_se` and `_se_users`, `samples` and `users`.

    Example:
        >>> figures = ranking_figures(torch.tensor([1, 99]), np.array([0, 1]))
        >>> figures["hit_rate@10"], figures["hit_rate@10_se"], figures["users"]
        (0.5, 0.5, 2)
    """
    hit = (ranks.numpy() <= K).astype(np.float64)
    user, n_users = np.unique(users, return_inverse=True)[1], len(np.unique(users))
    figures: dict[str, float | int] = {}
    for name, values in zip(FIGURES, (hit, gains(ranks)), strict=True):
        n, away = len(values), values - values.mean()
        sums = np.bincount(user, weights=away, minlength=n_users)
        figures[name] = float(values.mean())
        figures[f"{name}_se"] = _root((away**2).sum(), n) / np.sqrt(n)
        figures[f"{name}_se_users"] = _root((sums**2).sum(), n_users) * np.sqrt(n_users) / n
    return {name: float(value) for name, value in figures.items()} | {"samples": len(hit), "users": n_users}


def _root(squares: float, n: int) -> float:
    return float(np.sqrt(squares / (n - 1))) if n > 1 else float("nan")


def popularity_figures(data: RecDataModule) -> dict[str, float | int]:
    """Computes `ranking_figures` of the test part for items ranked by their interactions in the train part."""
    scores = torch.from_numpy(data.item_popularity).float()
    ranks, users = [], []
    for batch in data.sample_loader(data.test_ids):
        ranks.append(target_rank(scores.expand(len(batch["target"]), -1), batch["target"], batch["seen"]))
        users.append(batch["user"])
    return ranking_figures(torch.cat(ranks), torch.cat(users).numpy())


def popularity_row(data: RecDataModule) -> Row:
    """Makes the row of popularity in `results.json`; it costs nothing."""
    return {"stage": "popularity", **popularity_figures(data), **Cost().row()}


def sample_ranks(policy: Policy, data: RecDataModule, sample_ids: IntArray) -> Tensor:
    """Ranks the target of each sample among the whole catalogue with what the user had masked, int64 [n], from 1.

    Neither the policy's mode nor any global random number generator is disturbed.

    Args:
        policy: bound to the catalogue of `data`.
        data: already read.
        sample_ids: [n], eligible.
    """
    device = next(policy.parameters()).device
    ranks = [torch.empty(0, dtype=torch.int64)]
    with isolated_random_state(), evaluation_mode(policy), torch.no_grad():
        for batch in data.sample_loader(sample_ids):
            batch = move_data_to_device(batch, device)
            scores = item_logps(policy, batch)
            ranks.append(target_rank(scores, batch["target"], batch["seen"]).cpu())
    return torch.cat(ranks)
