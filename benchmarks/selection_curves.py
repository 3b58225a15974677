"""Cost of max-min selection and of the plain greedy over N, d and k: clustered embeddings, scores uniform in [0, 2]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from measuring import alternate, cell, ratio_cell, summary
from selection_maxmin import embedding_blocks, plain_greedy, scores_of, unit_rows

from minirec_pl.selection import maxmin_select

PICTURE = "selection_curves.png"
BASE = {"n": 20_000, "d": 256, "k": 500}
CURVES = {
    "n": (5_000, 20_000, 80_000, 320_000),
    "d": (64, 256, 1_024, 4_096),
    "k": (125, 500, 2_000, 8_000),
}
NAMES = {"n": "N", "d": "d", "k": "k"}
MEANING = {"n": "samples of the pool", "d": "values of an embedding", "k": "picks"}
COLOURS = {"plain": "#D55E00", "lazy": "#0072B2"}  # Okabe and Ito


def run(
    threads: int,
    *,
    base: dict[str, int] = BASE,
    curves: dict[str, tuple[int, ...]] = CURVES,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measures, one size varied at a time."""
    torch.set_num_threads(threads)
    return {
        "base": base,
        "curves": {
            name: [{"at": size} | _point(**base | {name: size}, repeats=repeats) for size in sizes]
            for name, sizes in curves.items()
        },
    }


def _point(n: int, d: int, k: int, repeats: int) -> dict[str, Any]:
    embeddings = torch.cat(list(embedding_blocks("clustered", n, d)))
    unit, score = unit_rows(embeddings), scores_of("uniform", n)
    score32 = torch.from_numpy(score).float()
    rivals = {
        "plain": lambda: plain_greedy(unit, score32, k),
        "lazy": lambda: maxmin_select(embeddings, score, k),
    }
    _, seconds = alternate(rivals, repeats)
    return {name: summary(times) for name, times in seconds.items()}


def markdown(result: dict[str, Any]) -> str:
    """One table, under the picture."""
    base = ", ".join(f"{NAMES[name]} = {size:,}" for name, size in result["base"].items())
    lines = [
        f"![Seconds over N, d and k]({PICTURE})",
        "",
        f"One size varies, the others are {base}. Seconds: minimum / median.",
        "",
        "| size | plain greedy | `maxmin_select` | times faster |",
        "|---|---|---|---|",
    ]
    for name, points in result["curves"].items():
        for point in points:
            plain, lazy = point["plain"], point["lazy"]
            times = f"{cell(plain)} | {cell(lazy)} | {ratio_cell(plain, lazy)}"
            lines.append(f"| {NAMES[name]} = {point['at']:,} | {times} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws the minimum seconds, a panel for each size that varies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(result["curves"]), figsize=(12, 3.6), sharey=True, layout="constrained")
    for panel, (name, points) in zip(panels, result["curves"].items(), strict=True):
        sizes = [point["at"] for point in points]
        for rival, label, look in (("plain", "plain greedy", "o-"), ("lazy", "maxmin_select", "s--")):
            panel.loglog(sizes, [point[rival]["min"] for point in points], look, color=COLOURS[rival], label=label)
        fixed = ", ".join(f"{NAMES[other]} = {size:,}" for other, size in result["base"].items() if other != name)
        panel.set(xlabel=f"{NAMES[name]}, {MEANING[name]}", title=fixed)
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds, fastest of the repeats")
    panels[0].legend()
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
