"""The pictures of a report, as SVG in data URIs."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from minirec_pl.reporting.plots import BLUE, HIGHER, VERMILION, plot_map, plot_plan

Floats = npt.NDArray[np.float64]
GREEN = "#009E73"  # as BLUE and VERMILION of the palette of Okabe and Ito
COLOURS = (BLUE, VERMILION, GREEN, "#E69F00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "xx", "\\\\")
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "minirec",
}
_SIZE, _WIDE = (4.6, 3.1), (5.6, 3.1)  # inches
_BINS = 30
FIGURE_WORDS = {"hit_rate@10": "HR@10", "ndcg@10": "NDCG@10"}


@dataclass(frozen=True)
class Picture:
    """An image with the words that stand for it and beside it.

    Attributes:
        uri: `data:image/svg+xml;base64,...`
        alt: what it shows, for those who cannot see it.
        caption: how to read it.
        wide: whether it takes the whole width.
    """

    uri: str
    alt: str
    caption: str
    wide: bool = False


def style() -> AbstractContextManager[None]:
    """Sets what all pictures of a report have in common, as a context manager."""
    return mpl.rc_context(_STYLE)


def _axes(size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _uri(figure: Figure) -> str:
    written = BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", dpi=150, metadata=nothing)
    return f"data:image/svg+xml;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"


def _literal(name: str) -> str:
    """Escapes dollars in a name, which matplotlib would take for a formula."""
    return name.replace("$", r"\$")


def quality(evaluations: Mapping[str, pd.DataFrame], figure_name: str, over: str, label: str) -> Picture:
    """Draws a figure of validation over what was spent, a line per run that spent anything.

    The bars are one standard error with users as the unit. The axis holds at least two of them on either side, or,
    where none is known, a tenth of the value.

    Args:
        evaluations: of each run, see `minirec_pl.callbacks.run_folder.RunFolder`.
        figure_name: a column of them; `<figure_name>_se_users` has its errors.
        over: another: rollouts, tokens or seconds.
        label: the x axis in words.
    """
    figure, axes = _axes()
    styles = zip(cycle(COLOURS), cycle(DASHES), cycle(MARKERS), strict=False)
    ends: list[str] = []
    low, high, bars, words = math.inf, -math.inf, False, FIGURE_WORDS.get(figure_name, figure_name)
    for (name, table), (colour, dash, marker) in zip(evaluations.items(), styles, strict=False):
        if table[over].iloc[-1] == 0:
            continue
        values = table[figure_name]
        error = table.get(f"{figure_name}_se_users", values * math.nan)
        look: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 4}
        caps = 2 + 2 * len(ends)  # so that bars over each other can be told apart
        axes.errorbar(table[over], values, error, capsize=caps, elinewidth=0.8, label=_literal(name), **look)
        room = np.where(error.notna(), 2 * error, 0.1 * values.abs())
        low, high = min(low, float((values - room).min())), max(high, float((values + room).max()))
        bars |= bool(error.notna().any())
        ends.append(f"{name} ends at {values.iloc[-1]:.4f} after {table[over].iloc[-1]:,.0f}")
    axes.set(xlabel=label, ylabel=f"{words} on validation", xlim=(0, None))
    if low < high:
        axes.set_ylim(max(0.0, low), high)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    if len(evaluations) > 1:
        columns = 2 if max(map(len, evaluations)) < 25 else 1
        figure.legend(loc="outside upper left", ncols=columns, fontsize=8)
    errors = "Bars: ± one standard error, users as the unit." if bars else "No errors are stored."
    caption = f"Over {label}. {errors}"
    return Picture(_uri(figure), f"{words} on validation over {label}: {'; '.join(ends)}.", caption)


def pool_and_picks(pool: Floats, picks: Floats, label: str, caption: str, *, logarithmic: bool = False) -> Picture:
    """Draws two histograms over each other, each in shares of its own samples.

    Args:
        pool: [N], NaN left out; an empty one is not drawn.
        picks: [n], likewise.
        label: what they are.
        caption: see `Picture`.
        logarithmic: equal steps of the logarithm, if nearly all values are crowded near zero.
    """
    figure, axes = _axes()
    pool, picks = pool[~np.isnan(pool)], picks[~np.isnan(picks)]
    both = np.concatenate([pool, picks])
    low, high = float(both.min()), float(both.max())
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    if logarithmic and low >= 0 and np.median(both) > 0 and np.quantile(both, 0.9) < 0.3:
        floor = max(float(np.quantile(both[both > 0], 0.02)), high * 1e-4)
        edges = np.geomspace(floor, high, _BINS + 1) if floor < high else edges
        pool, picks = pool.clip(floor), picks.clip(floor)
        axes.set_xscale("log")
        caption += f" The axis is logarithmic; its first bar also holds what lies below {floor:.2g}."
    bins = edges.tolist()
    if len(pool):
        share = np.full(len(pool), 1 / len(pool))
        look: dict[str, Any] = {"color": "0.82", "edgecolor": "0.45", "linewidth": 0.5}
        axes.hist(pool, bins, weights=share, label=f"pool, {len(pool):,}", **look)
    if len(picks):
        share = np.full(len(picks), 1 / len(picks))
        look = {"histtype": "step", "color": VERMILION, "linewidth": 1.6, "hatch": "////"}
        axes.hist(picks, bins, weights=share, label=f"picks, {len(picks):,}", **look)
    axes.set(xlabel=label, ylabel="share of its samples")
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    parts = [f"median {np.median(of):.3g} in the {name}" for name, of in (("pool", pool), ("picks", picks)) if len(of)]
    return Picture(_uri(figure), f"Histogram of {label}: {', '.join(parts)}.", caption)


def learnability_curve(difficulty: Floats, learnability: Floats, gate: tuple[float, float], name: str) -> Picture:
    """Draws the histogram of the difficulty in use, with the learnability of each value.

    Args:
        difficulty: [n] of the scored pool.
        learnability: [n], scaled to [0, 1].
        gate: lowest and highest difficulty that may be picked; infinite where open.
        name: what the difficulty is, in words.
    """
    figure, axes = _axes(_WIDE)
    order = np.argsort(difficulty)
    low, high = float(difficulty.min()), float(difficulty.max())
    axes.hist(difficulty, _BINS, color="0.82", edgecolor="0.45", linewidth=0.5, label="samples of the pool")
    for start, end in ((low, gate[0]), (gate[1], high)):
        if start < end:
            shut: dict[str, Any] = {
                "facecolor": "none",
                "edgecolor": "0.4",
                "hatch": "xx",
                "linewidth": 0.8,
                "alpha": 0.6,
            }
            axes.axvspan(start, end, label="outside the gate", **shut)
    axes.set(xlabel=f"{name} ({HIGHER})", ylabel="samples of the pool")
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.plot(difficulty[order], learnability[order], color=BLUE, linewidth=2, label="learnability L")
    right.set(ylabel="learnability L, scaled to 0 to 1", ylim=(0, 1.05))
    figure.legend(loc="outside upper left", ncols=3, fontsize=8)
    peak = float(difficulty[int(learnability.argmax())])
    alt = (
        f"Histogram of the {name} of {len(difficulty):,} samples, median {np.median(difficulty):.3g}, with the "
        f"learnability curve, which is highest at {peak:.3g}."
    )
    caption = f"Bars count samples (left axis), the line is what learnability makes of their {name} (right axis)."
    return Picture(_uri(figure), alt, caption, wide=True)


def value_by_rank(value: Floats, words: str) -> Picture:
    """Draws the value of each pick, in the order of the pick; `words` say what the value is."""
    figure, axes = _axes()
    axes.plot(np.arange(1, len(value) + 1), value, color=GREEN, linewidth=1.6)
    axes.set(xlabel="rank of the pick, from 1", ylabel=f"value, {words}", ylim=(min(0.0, value.min()), None))
    alt = f"Value by rank: {value[0]:.3g} of the first pick, {value[-1]:.3g} of the last, {len(value):,}."
    return Picture(_uri(figure), alt, f"What a pick was worth when its turn came: {words}.")


def vector_map(vectors: torch.Tensor, sample_id: torch.Tensor, plan: pd.DataFrame, what: str) -> Picture:
    """Draws vectors on their two principal components, see `minirec_pl.reporting.plots.plot_map`.

    Args:
        vectors: [N, D].
        sample_id: [N].
        plan: of the picks.
        what: what the vectors are.
    """
    figure, axes = _axes((4.6, 3.7))
    share = plot_map(axes, vectors, sample_id, plan)
    held = "" if math.isnan(share) else f", which hold {share:.0%} of the variance"
    alt = f"Map of the {what} of {len(sample_id):,} samples of the pool, with {len(plan):,} picks by fold."
    caption = f"The {what}, as unit vectors on the first two principal components of the pool{held}. Grey: the pool."
    return Picture(_uri(figure), alt, caption)


def plan(table: pd.DataFrame) -> Picture:
    """Draws the easiness along a plan, see `run_files.plan_table`; older ones lack its `measure`."""
    figure, axes = _axes(_WIDE)
    starts = np.flatnonzero(np.diff(table["fold"], prepend=-1)).tolist()
    measure = table["measure"].iloc[0] if "measure" in table else "easiness"
    plot_plan(axes, table["easiness"].tolist(), starts, measure)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    folds = f" in {len(starts)} folds, told apart by shade" if len(starts) > 1 else ""
    when = f" of epoch {table['epoch'].iloc[0]}" if "epoch" in table else ""
    caption = f"The last plan{when}: {len(table):,} samples{folds}."
    alt = f"{measure.capitalize()} of each sample in the order of training. {caption}"
    return Picture(_uri(figure), alt, caption, wide=True)


def stacked(cost: Mapping[str, Mapping[str, float]], phases: Sequence[str], label: str) -> Picture:
    """Draws what runs spent by phase, as bars.

    Args:
        cost: by run, then by phase.
        phases: in the order of the bar's parts.
        label: the unit in words.
    """
    figure, axes = _axes((_WIDE[0], 1.3 + 0.32 * len(cost)))
    names, left = list(cost), np.zeros(len(cost))
    for phase, colour, hatch in zip(phases, cycle(COLOURS), cycle(HATCHES), strict=False):
        widths = np.array([cost[name].get(phase, 0.0) for name in names])
        if not widths.any():
            continue
        words = phase.replace("_", " ")
        axes.barh(
            [_literal(name) for name in names],
            widths,
            left=left,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            height=0.65,
            label=words,
        )
        left += widths
    axes.invert_yaxis()
    axes.set(xlabel=label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside upper left", ncols=4, fontsize=8)
    sums = "; ".join(f"{name} {total:,.0f}" for name, total in zip(names, left, strict=True))
    return Picture(
        _uri(figure), f"{label.capitalize()} by phase, in all: {sums}.", f"{label.capitalize()} by phase.", wide=True
    )
