"""Pictures that a run leaves behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minirec_pl.selection.diagnostics import ease_of
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.signals import Signals
from minirec_pl.utils.files import write_atomically

_SHOWN = 20_000  # pool samples in the map
BLUE, VERMILION = "#0072B2", "#D55E00"  # of the palette of Okabe and Ito
HIGHER = "higher is easier"


def draw_curriculum(
    easiness: Sequence[float],
    fold_starts: Sequence[int],
    epoch: int,
    path: Path,
    order: str | None = None,
    measure: str = "mean reward",
) -> None:
    """Draws the easiness of each sample along a plan, folds told apart by shade and line.

    Args:
        easiness: of each sample, in the order of training; NaN where unknown.
        fold_starts: positions at which a fold starts.
        epoch: the epoch that the plan was made for, from 0; the title counts from 1.
        path: PNG file to write, replaced whole or not at all.
        order: the order in words, for the title; None for folds from easy to hard.
        measure: what the easiness is, in words.
    """
    figure = Figure(figsize=(9, 3.8))
    axes = figure.add_axes((0.115, 0.125, 0.87, 0.705))  # a layout engine takes as long as the drawing
    plot_plan(axes, easiness, fold_starts, measure)
    folds = f" in {len(fold_starts)} fold{'s' if len(fold_starts) > 1 else ''}, easy to hard in each"
    words = f", {order}" if order else folds if fold_starts else ", in no order of difficulty"
    title = f"Plan of epoch {epoch + 1}: {len(easiness):,} samples{words}"
    figure.text(0.115, 0.98, title, fontsize="large", va="top")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False)
    write_atomically(path, lambda scratch: figure.savefig(scratch, dpi=150, format="png"))


def plot_plan(axes: Axes, easiness: Sequence[float], fold_starts: Sequence[int], measure: str) -> None:
    """Plots what `draw_curriculum` draws, without a legend; arguments as there."""
    ends = [*fold_starts[1:], len(easiness)]
    folds = [(start, end - start) for start, end in zip(fold_starts, ends, strict=False)]
    whole = axes.get_xaxis_transform()
    axes.broken_barh(folds[1::2], (0, 1), color="0.93", zorder=0, transform=whole)
    axes.vlines(fold_starts[1:], 0, 1, color="0.6", linewidth=0.8, linestyle=":", transform=whole)
    look: dict[str, Any] = {"markersize": 3, "color": BLUE, "rasterized": True}
    axes.plot(range(len(easiness)), easiness, ".", label=f"{measure} of a sample", **look)
    known = [value for value in easiness if not math.isnan(value)]
    if known:
        mean = sum(known) / len(known)
        axes.axhline(mean, color=VERMILION, linewidth=1.2, linestyle="--", label=f"mean of the plan, {mean:.3g}")
    axes.set(xlabel="position in the epoch [samples]", xlim=(0, max(1, len(easiness))))
    axes.set_ylabel(f"{measure}\n({HIGHER})", fontsize=9)
    set_limits(axes, known)
    axes.spines[["top", "right"]].set_visible(False)


def set_limits(axes: Axes, values: Sequence[float]) -> None:
    """Makes a y axis of rewards or probabilities begin at 0 and end above them, at 1 where they are all 0.

    Args:
        axes: whose y axis it is.
        values: finite; if one is negative, the axis is left to matplotlib.
    """
    if values and min(values) >= 0:
        axes.set_ylim(0, max(values) * 1.08 or 1.0)


def draw_reliability(predicted: Sequence[float], observed: Sequence[float], path: Path) -> None:
    """Draws the reliability curve of predicted solve probabilities, with the diagonal that a calibrated one follows.

    Args:
        predicted: mean prediction of each bin, in [0, 1].
        observed: share of the bin's rollouts that hit.
        path: PNG file to write, replaced whole or not at all.
    """
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axes = figure.subplots()
    end = max(*predicted, *observed, 1e-3) * 1.08
    axes.plot([0, end], [0, end], color="0.6", linewidth=0.8, linestyle=":", label="calibrated")
    axes.plot(predicted, observed, "o-", color=BLUE, markersize=4, label="bins of equally many groups")
    axes.set(xlabel="predicted solve probability", ylabel="share of rollouts that hit", xlim=(0, end), ylim=(0, end))
    axes.set_title("Predictions of the last plan", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_atomically(path, lambda scratch: figure.savefig(scratch, dpi=150, format="png"))


def draw_selection(signals: Signals, ledger: SelectionLedger, plan: pd.DataFrame, path: Path) -> None:
    """Draws the score over the easiness of picks and pool, and a map of the embeddings with the picks by fold.

    Where the selector gave no score, or no easiness is known, it draws what there is as histograms. The map is the
    projection on the two principal components of the pool's unit embeddings; it is left out where there are none.

    Args:
        signals: [N] of the pool.
        ledger: of the selection.
        plan: columns `sample_id` and `fold`, see `minirec_pl.cli.select.plan_table`.
        path: PNG file to write, replaced whole or not at all.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_scores(left, ledger)
    _draw_map(right, signals, plan)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda scratch: figure.savefig(scratch, dpi=150, format="png"))


def _draw_scores(axes: Axes, ledger: SelectionLedger) -> None:
    table, easiness = ledger.table, ease_of(ledger)
    score, words = table["score"], "score, alpha L + beta R"
    if score.isna().all():
        score, words = table["value"], "value, by which the selector picks"
    picked = table["rank"].notna()
    groups = (("not picked", ~picked, "0.7", ".", 3), ("picked", picked, VERMILION, "x", 4))
    what = f"{easiness.name} ({HIGHER})"
    if score.notna().any() and easiness.notna().any():
        for name, rows, colour, marker, size in groups:
            look: dict[str, Any] = {"color": colour, "markersize": size, "linestyle": "", "rasterized": True}
            axes.plot(easiness[rows], score[rows], marker=marker, label=f"{name}, {rows.sum():,}", **look)
        axes.set(xlabel=what, ylabel=words)
        axes.set_title(f"{words.partition(',')[0].capitalize()} over {easiness.name}", loc="left")
    else:
        values, label = (easiness, what) if easiness.notna().any() else (score, words)
        axes.set_title(f"{label.partition(',')[0].partition(' (')[0].capitalize()} of pool and picks", loc="left")
        if values.isna().all():
            _say(axes, "no rewards, solve probabilities or scores")
            return
        edges = np.histogram_bin_edges(values.dropna(), 30).tolist()
        for name, rows, colour, _, _ in (("pool", picked | True, "0.6", "", 0), groups[1]):
            of, dashes = values[rows].dropna(), "-" if name == "pool" else "--"
            look = {"histtype": "step", "color": colour, "linewidth": 1.5, "linestyle": dashes}
            axes.hist(of, edges, weights=np.full(len(of), 1 / max(1, len(of))), label=f"{name}, {len(of):,}", **look)
        axes.set(xlabel=label, ylabel="share of samples")
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=28)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="0.4")
    axes.set_axis_off()


def _draw_map(axes: Axes, signals: Signals, plan: pd.DataFrame) -> None:
    by_fold = " by fold" if plan["fold"].max() > 0 else ""
    axes.set_title(f"Embeddings of the pool (grey) and the picks{by_fold}", loc="left")
    if signals.embedding is None:
        _say(axes, "no embeddings")
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
    n_folds = int(plan["fold"].max()) + 1
    colours = mpl.colormaps["viridis"].resampled(n_folds)
    look: dict[str, Any] = {"s": 12, "edgecolors": "0.15", "linewidths": 0.4, "rasterized": True, "c": VERMILION}
    if n_folds > 1:
        look |= {"c": plan["fold"] + 1, "cmap": colours, "vmin": 0.5, "vmax": n_folds + 0.5}
    folds = axes.scatter(at[:, 0], at[:, 1], **look)
    if n_folds > 1:
        ticks = MaxNLocator(integer=True, min_n_ticks=2)
        axes.figure.colorbar(folds, ax=axes, label="fold of the plan, in the order of training", ticks=ticks)
    axes.set(xlabel="first principal component", ylabel="second principal component", xticks=[], yticks=[])
    return share
