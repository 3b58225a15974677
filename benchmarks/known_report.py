"""Tables and picture of `known_pool.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from known_kinds import KINDS
from scipy import stats

SCORED = ("minirec", "minirec 0.1")
FIGURE = "ndcg@10"
COLOURS = {"minirec": "#0072B2", "minirec 0.1": "#56B4E9", "random": "#D55E00", "full": "#009E73"}  # Okabe and Ito
STYLES = {"minirec": "-", "minirec 0.1": "--", "random": "-.", "full": ":"}
KIND_COLOURS = dict(zip(KINDS, ("#0072B2", "#009E73", "#E69F00", "#999999", "#CC79A7"), strict=True))
HATCHES = dict(zip(KINDS, ("", "//", "..", "xx", "\\\\"), strict=True))
Row = Mapping[str, Any]
ABOUT = """
# What must be true of a pool for selection to pay

Written by `{command}`, {date}, {cpu_seconds:.0f} s of processor time on one thread: {machine}. Seeds {seeds}, each of
data, weights, order and rollouts. `benchmarks/known_pool.py`, `known_kinds.py` and `known_cells.py` say what the pools,
kinds and methods are.

Pools of {n_pool} samples; random and MiniRec train on {per_epoch} of them an epoch, {epochs} epochs, {batch_size} a
step, G = 16, AdamW at a constant {lr}. MiniRec is set as in `configs/ml-100k/quickstart.yaml`: mode paper, group
difficulty, mu 0.3, gate 0.02 to 0.95, exact solve probabilities (no scoring rollouts), re-scored as a whole after each
epoch; MiniRec 0.1 re-scores a tenth, the library's default. The rate is the highest of 1e-3, 2e-3 and 4e-3 at which
random did not reach the ceiling in 10 epochs on a pool of useful samples alone (validation part of seed 100, which is
not among the seeds); nothing else was tuned. Tokens are forward and backward ones, scoring included, without the warm
start, which all share; a group without reward variance costs no backward pass. ± is the 95 % interval of Student's t
over the seeds; differences are paired by seed and not corrected for their number. The curves of the rivals are read
straight between their points, one every three epochs of random and every half epoch of the full pool.
"""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the 95 % interval of Student's t."""
    spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(stats.t.ppf(0.975, max(1, len(values) - 1)) * spread)


def by_pool(result: Row) -> dict[str, list[Row]]:
    """The rows of each pool, a row a seed."""
    pools: dict[str, list[Row]] = {}
    for row in result["rows"]:
        pools.setdefault(row["pool"], []).append(row)
    return pools


def at(method: str, other: str | None = None, figure: str = FIGURE) -> Callable[[Row], float]:
    """Reads a figure off a row: after the budgeted epochs or, with `other`, at the tokens that method spent."""
    if other is None:
        return lambda row: row["methods"][method]["samples"][figure]
    return lambda row: row["methods"][method]["at_tokens_of"][other][figure]


def differences(method: str) -> dict[str, Callable[[Row], float]]:
    """What is told of a MiniRec, by heading: its figure less that of a rival on the same pool and seed."""
    rivals = {
        "random, equal samples": at("random"),
        "random, equal tokens": at("random", method),
        "full pool, equal tokens": at("full", method),
    }
    own = at(method)
    return {name: (lambda row, rival=rival: own(row) - rival(row)) for name, rival in rivals.items()}


def cell(values: Sequence[float], sign: bool = False) -> str:
    mean, half = interval(values)
    return f"{mean:+.3f} ± {half:.3f}" if sign else f"{mean:.3f} ± {half:.3f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _quality(pools: Mapping[str, Sequence[Row]]) -> str:
    columns: dict[str, Callable[[Row], float]] = {
        "warm start": lambda row: row["methods"]["minirec"]["warm"][FIGURE],
        "random, equal samples": at("random"),
        "MiniRec": at("minirec"),
        "random, its tokens": at("random", "minirec"),
        "full, its tokens": at("full", "minirec"),
        "MiniRec 0.1": at("minirec 0.1"),
        "random, its tokens ": at("random", "minirec 0.1"),
        "full, its tokens ": at("full", "minirec 0.1"),
    }
    lines = [[name, *(cell([read(row) for row in rows]) for read in columns.values())] for name, rows in pools.items()]
    return table(["pool", *columns], lines)


def _paired(pools: Mapping[str, Sequence[Row]], method: str) -> tuple[str, str]:
    """The table, and which pools are ahead and behind in one line a rival."""
    told = differences(method)
    lines, verdicts = [], []
    for name, rows in pools.items():
        hits = [at(method, figure="hit_rate@10")(row) - at("random", method, "hit_rate@10")(row) for row in rows]
        cells = [cell([read(row) for row in rows], sign=True) for read in told.values()]
        lines.append([name, *cells, cell(hits, sign=True)])
    for heading, read in told.items():
        found = {name: interval([read(row) for row in rows]) for name, rows in pools.items()}
        ahead = [name for name, (mean, half) in found.items() if mean - half > 0]
        behind = [name for name, (mean, half) in found.items() if mean + half < 0]
        verdicts.append(
            f"- Against {heading}: ahead in {_some(ahead, len(pools))}; behind in {_some(behind, len(pools))}."
        )
    return table(["pool", *told, "hit rate: random, equal tokens"], lines), "\n".join(verdicts)


def _some(names: Sequence[str], n_pools: int) -> str:
    if len(names) == n_pools:
        return "every pool"
    return ", ".join(f"`{name}`" for name in names) or "none"


def share_of_picks(rows: Sequence[Row], method: str) -> dict[str, float]:
    """Share of each kind in what was trained on in the budgeted epochs, mean of the seeds."""
    shares = [np.array([row["methods"][method]["picks"][kind] for kind in KINDS], dtype=float) for row in rows]
    return dict(zip(KINDS, np.mean([share / share.sum() for share in shares], axis=0).tolist(), strict=True))


def _picks(pools: Mapping[str, Sequence[Row]]) -> str:
    lines = []
    for name, rows in pools.items():
        counts = rows[0]["counts"]
        lines.append([f"{name}: pool", *(f"{counts.get(kind, 0) / sum(counts.values()):.0%}" for kind in KINDS), ""])
        for method in SCORED:
            shares = share_of_picks(rows, method)
            trained = np.mean([sum(row["methods"][method]["picks"].values()) for row in rows])
            lines.append([f"{method}", *(f"{shares[kind]:.0%}" for kind in KINDS), f"{trained:.0f}"])
    return table(["pool, picks", *KINDS, "samples trained on"], lines)


def _first(pools: Mapping[str, Sequence[Row]]) -> str:
    found: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for rows in pools.values():
        for row in rows:
            for kind, said in row["methods"]["minirec"]["first"].items():
                found[kind].append(said)
    names = ("difficulty", "too_hard", "too_easy", "redundant")
    lines = [
        [kind, *(f"{np.mean([said[name] for said in rows]):.2f}" for name in names)]
        for kind, rows in found.items()
        if rows
    ]
    return table(["kind", "median q", "gated: too hard", "gated: too easy", "left out as redundant"], lines)


def _cost(pools: Mapping[str, Sequence[Row]]) -> str:
    lines = []
    for name, rows in pools.items():
        line = [name, f"{np.mean([at('random', figure='tokens')(row) for row in rows]):,.0f}"]
        for method in SCORED:
            spent = [row["methods"][method]["tokens"] for row in rows]
            line.append(" + ".join(f"{np.mean([s[phase] for s in spent]):,.0f}" for phase in ("scoring", "training")))
        line.append(f"{np.mean([at('full', figure='tokens')(row) for row in rows]):,.0f}")
        lines.append(line)
    return table(["pool", "random", *(f"{m}: scoring + training" for m in SCORED), "full, as many epochs"], lines)


def report(result: Row, picture: str) -> str:
    """The Markdown."""
    pools, options = by_pool(result), result["settings"]
    blocks = {method: _paired(pools, method) for method in SCORED}
    about = ABOUT.format(
        **{key: value for key, value in result.items() if key not in ("rows", "settings", "seeds")},
        **options,
        seeds=", ".join(map(str, result["seeds"])),
        per_epoch=round(options["n_pool"] * options["budget"]),
    )
    parts = [
        about.strip(),
        f"![Paired differences, curves and picks]({picture})",
        "## NDCG@10 on held-out samples of the rules (solved and useful, half each)",
        _quality(pools),
        "## MiniRec less its rivals, NDCG@10, paired",
        "Re-scored as a whole after each epoch:",
        *blocks["minirec"],
        "A tenth re-scored after each epoch:",
        *blocks["minirec 0.1"],
        "## What was trained on, by kind",
        _picks(pools),
        "What the first scoring says of the kinds, before any training (q: probability that a group of 16 holds a hit; "
        "means over pools and seeds):",
        _first(pools),
        "## Tokens after the budgeted epochs",
        _cost(pools),
    ]
    return "\n\n".join(parts) + "\n"


def drawn(names: Sequence[str]) -> str:
    """The pool whose curves are kept and drawn."""
    return "10% useful" if "10% useful" in names else names[0]


def plot(result: Row, path: Path) -> None:
    """Differences by pool, curves of one pool, and picks by kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pools = by_pool(result)
    names = list(pools)
    labels = [name.replace(", rest", ",\nrest") for name in names]
    figure, ((first, second), (third, fourth)) = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
    for panel, heading in ((first, "random, equal samples"), (second, "random, equal tokens")):
        for method, marker, shift in (("minirec", "o", -0.12), ("minirec 0.1", "s", 0.12)):
            read = differences(method)[heading]
            found = np.array([interval([read(row) for row in pools[name]]) for name in names])
            panel.errorbar(
                found[:, 0],
                np.arange(len(names)) + shift,
                xerr=found[:, 1],
                fmt=marker,
                color=COLOURS[method],
                capsize=3,
                label=method,
            )
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(names)), labels)
        panel.invert_yaxis()
        panel.set(xlabel="NDCG@10, MiniRec less random, 95 % interval", title=f"Against {heading}")
        panel.grid(axis="x", alpha=0.3)
        panel.legend()
    shown = drawn(names)
    for method in COLOURS:
        curves = [np.array(row["methods"][method]["curve"]) for row in pools[shown]]
        grid = np.linspace(0, min(curve[-1, 0] for curve in curves), 50)
        values = np.array([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves])
        mean, half = np.array([interval(column) for column in values.T]).T
        third.plot(grid / 1000, mean, STYLES[method], color=COLOURS[method], label=method)
        third.fill_between(grid / 1000, mean - half, mean + half, color=COLOURS[method], alpha=0.15, linewidth=0)
    third.set(xlabel="thousand tokens, scoring included", ylabel="NDCG@10", title=f"Pool: {shown}, 95 % over seeds")
    third.grid(alpha=0.3)
    third.legend()
    left = np.zeros(len(names))
    for kind in KINDS:
        share = np.array([share_of_picks(pools[name], "minirec")[kind] for name in names])
        fourth.barh(
            range(len(names)),
            share,
            left=left,
            color=KIND_COLOURS[kind],
            hatch=HATCHES[kind],
            edgecolor="white",
            label=kind,
        )
        left += share
    fourth.set_yticks(range(len(names)), labels)
    fourth.invert_yaxis()
    fourth.set(xlabel="share of picks", title="What minirec picked, by kind")
    fourth.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
