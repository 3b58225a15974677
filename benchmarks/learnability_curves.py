"""Draws learnability over the solve probability: MiniRec's Gaussian and the size of the expected update.

python benchmarks/learnability_curves.py --to docs/learnability.svg
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import torch

from minirec_pl.selection import learnability, update_learnability

SIGMA = 0.25  # of the mean reward over a pool that spreads over the whole range
SIZES = {4: "dotted", 16: "dashed", 64: "solid"}
SCALES = {"group": "scale_rewards: group", "mean": "scale_rewards: mean (MaxRL)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="SVG or PNG file to write")
    to = parser.parse_args().to
    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "learnability", "svg.fonttype": "none"}
    from matplotlib import pyplot as plt

    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    gaussian = learnability(p, mu=0.5, sigma=SIGMA)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, (scale, title) in zip(axes, SCALES.items(), strict=True):
        axis.plot(p, gaussian, color="0.6", linewidth=3, label=f"Gaussian, mu 0.5, sigma {SIGMA}")
        for group, style in SIZES.items():
            size = update_learnability(p, group, scale_rewards=scale)
            axis.plot(p, size, color="C0", linestyle=style, label=f"update, G = {group}")
        axis.set(title=title, xlabel="solve probability p", xlim=(0, 1), ylim=(0, 1.05))
    axes[0].legend(loc="lower center", fontsize="small")
    axes[0].set_ylabel("learnability")
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
