"""Pictures that a run leaves behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from minirec_pl.files import write_atomically


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
    ends = [*fold_starts[1:], len(rewards)]
    for fold, (start, end) in enumerate(zip(fold_starts, ends, strict=False)):
        if fold % 2:
            axes.axvspan(start, end, color="0.93", zorder=0)
    for start in fold_starts[1:]:
        axes.axvline(start, color="0.6", linewidth=0.8, linestyle=":")
    axes.plot(range(len(rewards)), rewards, ".", markersize=3, color="#0072B2", label="mean reward of a sample")
    known = [reward for reward in rewards if not math.isnan(reward)]
    if known:
        mean = sum(known) / len(known)
        axes.axhline(mean, color="#D55E00", linewidth=1.2, label=f"mean of the plan, {mean:.3f}")
    folds = f" in {len(fold_starts)} fold{'s' if len(fold_starts) > 1 else ''}, easy to hard in each"
    words = f", {order}" if order else folds if fold_starts else ", in no order of difficulty"
    axes.set(xlabel="position in the epoch", ylabel="mean reward", xlim=(0, max(1, len(rewards))))
    axes.set_title(f"Plan of epoch {epoch}: {len(rewards):,} samples{words}", loc="left")
    axes.margins(y=0.25)
    axes.legend(loc="upper right", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda scratch: figure.savefig(scratch, dpi=150, format="png"))
