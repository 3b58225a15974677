"""Pictures that a run leaves behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.signals import Signals
from minirec_pl.utils.files import write_atomically

_SHOWN = 20_000  # pool samples in the map


def draw_curriculum(
    rewards: Sequence[float], fold_starts: Sequence[int], epoch: int, path: Path, order: str | None = None
) -> None:
    """Draws the mean reward of each sample along a plan, folds told apart by shade and line.

    Args:
        rewards: mean reward of each sample, in the order of training; NaN where unknown.
        fold_starts: positions at which a fold starts.
        epoch: the epoch that the plan was made for.
        path: PNG file to write, replaced whole or not at all.
        order: the order in words, for the title; None for folds from easy to hard.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    plot_plan(axes, rewards, fold_starts)
    folds = f" in {len(fold_starts)} fold{'s' if len(fold_starts) > 1 else ''}, easy to hard in each"
    words = f", {order}" if order else folds if fold_starts else ", in no order of difficulty"
    axes.set_title(f"Plan of epoch {epoch}: {len(rewards):,} samples{words}", loc="left")
    write_atomically(path, lambda scratch: figure.savefig(scratch, dpi=150, format="png"))


def plot_plan(axes: Axes, rewards: Sequence[float], fold_starts: Sequence[int]) -> None:
    """Plots what `draw_curriculum` draws; arguments as there."""
    ends = [*fold_starts[1:], len(rewards)]
    for fold, (start, end) in enumerate(zip(fold_starts, ends, strict=False)):
        if fold % 2:
            axes.axvspan(start, end, color="0.93", zorder=0)
    for start in fold_starts[1:]:
        axes.axvline(start, color="0.6", linewidth=0.8, linestyle=":")
    look: dict[str, Any] = {"markersize": 3, "color": "#0072B2", "rasterized": True}
    axes.plot(range(len(rewards)), rewards, ".", label="mean reward of a sample", **look)
    known = [reward for reward in rewards if not math.isnan(reward)]
    if known:
        mean = sum(known) / len(known)
        axes.axhline(mean, color="#D55E00", linewidth=1.2, label=f"mean of the plan, {mean:.3f}")
    axes.set(xlabel="position in the epoch", ylabel="mean reward", xlim=(0, max(1, len(rewards))))
    axes.margins(y=0.25)
    axes.legend(loc="upper right", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def draw_selection(signals: Signals, ledger: SelectionLedger, plan: pd.DataFrame, path: Path) -> None:
    """Draws reward and score of picks against the pool, and a map of the embeddings with the picks coloured by fold.

    The map is the projection on the two principal components of the pool's unit embeddings; it is left out where there
    are no embeddings.

    Args:
        signals: [N] of the pool.
        ledger: of the selection.
        plan: columns `sample_id` and `fold`, see `minirec_pl.cli.select.plan_table`.
        path: PNG file to write, replaced whole or not at all.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    table = ledger.table
    easiness = table["reward_mean"].where(table["n_rollouts"] > 0, table["difficulty"])
    score = table["score"].where(table["score"].notna(), table["value"])
    picked = table["rank"].notna()
    if score.notna().any():
        left.plot(easiness[~picked], score[~picked], ".", color="0.7", markersize=3, label="pool", rasterized=True)
        left.plot(easiness[picked], score[picked], ".", color="#D55E00", markersize=4, label="picked", rasterized=True)
        left.set(xlabel="mean reward", ylabel="score, alpha L + R")
        if easiness.min() >= 0 and easiness.quantile(0.9) < 0.3:
            left.set_xscale("symlog", linthresh=1e-2)
    else:
        shares = {"pool": easiness.dropna(), "picked": easiness[picked].dropna()}
        for (name, values), color in zip(shares.items(), ("0.6", "#D55E00"), strict=True):
            left.hist(values, bins=30, density=True, histtype="step", color=color, linewidth=1.5, label=name)
        left.set(xlabel="mean reward", ylabel="density")
    left.set_title("Reward and score", loc="left")
    left.legend(frameon=False)
    _draw_map(right, signals, plan)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda scratch: figure.savefig(scratch, dpi=150, format="png"))


def _draw_map(axes: Axes, signals: Signals, plan: pd.DataFrame) -> None:
    axes.set_title("Embeddings, picks by fold", loc="left")
    if signals.embedding is None:
        axes.text(0.5, 0.5, "no embeddings", ha="center", va="center", transform=axes.transAxes, color="0.4")
        axes.set_axis_off()
        return
    plot_map(axes, signals.embedding, signals.sample_id, plan)


def plot_map(axes: Axes, vectors: torch.Tensor, sample_id: torch.Tensor, plan: pd.DataFrame) -> float:
    """Plots unit vectors of the pool on their two principal components, those of a plan coloured by fold.

    Args:
        axes: to plot on.
        vectors: [N, D] float.
        sample_id: [N] int64.
        plan: columns `sample_id` and `fold`.

    Returns:
        The share of the variance that the two components hold, in [0, 1]; NaN where all vectors are equal.
    """
    row_of = pd.Series(np.arange(len(sample_id)), index=sample_id.numpy())
    picks = row_of.loc[plan["sample_id"]].to_numpy()
    shown = np.union1d(np.random.default_rng(0).permutation(len(sample_id))[:_SHOWN], picks)
    unit = torch.nn.functional.normalize(vectors[torch.from_numpy(shown)].float(), dim=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, components = torch.pca_lowrank(unit, q=min(2, *unit.shape))
    centred = unit - unit.mean(dim=0)
    flat = (centred @ components).numpy()
    whole = float(centred.square().sum())
    share = float(np.square(flat).sum()) / whole if whole > 0 else math.nan
    flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    at = flat[np.searchsorted(shown, picks)]
    axes.plot(flat[:, 0], flat[:, 1], ".", color="0.8", markersize=3, zorder=0, rasterized=True)
    look: dict[str, Any] = {"cmap": "viridis", "s": 12, "edgecolors": "0.15", "linewidths": 0.4, "rasterized": True}
    folds = axes.scatter(at[:, 0], at[:, 1], c=plan["fold"], **look)
    n_folds = int(plan["fold"].max()) + 1
    if n_folds > 1:
        axes.figure.colorbar(folds, ax=axes, label="fold of the plan", ticks=MaxNLocator(integer=True))
    axes.set(xlabel="first principal component", ylabel="second", xticks=[], yticks=[])
    return share
