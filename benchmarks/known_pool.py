"""What must be true of a pool for selection to pay: pools whose samples have known kinds.

    python benchmarks/known_pool.py

The kinds are those of `known_kinds.py`. A pool has 640 samples; the share of useful ones falls from 100 % to 5 %, the
rest in equal parts hopeless, solved and redundant, and at 10 % also all of one kind, among them coins, which are noise
that looks half taught. All methods start from the same warm policy of a seed, a small Llama with one token an item:

minirec      mode paper, 10 % of the pool an epoch, the whole pool scored again after each epoch (`known_cells.py`).
minirec 0.1  the same, a tenth of the pool scored again after each epoch, the default of the library.
random       10 % of the pool, drawn anew each epoch.
full         the whole pool, shuffled each epoch.

The learning rate is constant, and random and full go on until they have spent the tokens of `minirec`, so that their
curves can be read at equal samples and at equal tokens (forward and backward, scoring included). Quality is that of
held-out samples of the two rules, solved and useful, as many of each.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from known_cells import METHODS, Settings, cell, warm_policy
from known_kinds import KINDS, KnownKinds, counts_of
from known_report import drawn, plot, report
from measuring import machine

from minirec_pl.utils.files import write_atomically, write_json

RESULTS = Path(__file__).resolve().parent / "results"
REST = ("hopeless", "solved", "redundant")
FIGURES = ("ndcg@10", "hit_rate@10", "ndcg@10 solved", "ndcg@10 useful")
POINTS = 25  # of a curve that is kept


def pools() -> dict[str, dict[str, float]]:
    """Shares of the kinds by name of the pool."""
    mixed = {
        f"{share:.0%} useful": {"useful": share} | dict.fromkeys(REST, (1 - share) / 3)
        for share in (1.0, 0.2, 0.1, 0.05)
    }
    return mixed | {f"10% useful, rest {kind}": {"useful": 0.1, kind: 0.9} for kind in (*REST, "coin")}


def at_tokens(points: Sequence[Mapping[str, float]], tokens: float) -> dict[str, float]:
    """The figures of a curve at a number of tokens, straight between its points."""
    spent = [point["tokens"] for point in points]
    return {name: float(np.interp(tokens, spent, [point[name] for point in points])) for name in FIGURES}


def run_pool(settings: Settings, source: KnownKinds, policy: Any, curves: bool) -> dict[str, Any]:
    """All methods on one pool and seed.

    Returns:
        By method the figures after the epochs of the settings (`samples`), of random and full also at the tokens of
        each MiniRec; tokens, picks by kind and, if asked for, the curve.
    """
    found: dict[str, Any] = {}
    spent: dict[str, int] = {}
    for method in METHODS:
        scored = method.startswith("minirec")
        cell_of = cell(settings, source, policy, method, 0 if scored else max(spent.values()))
        points = cell_of.pop("points")
        after = next(point for point in points if point["epoch"] == settings.epochs)
        if scored:
            spent[method] = int(points[-1]["tokens"])
        picks = cell_of.pop("picks")
        found[method] = cell_of | {
            "samples": {name: after[name] for name in (*FIGURES, "tokens")},
            "at_tokens_of": {other: at_tokens(points, tokens) for other, tokens in spent.items()},
            "picks": {kind: sum(epoch[kind] for epoch in picks[: settings.epochs]) for kind in KINDS},
            "epochs": len(picks),
            "warm": {name: points[0][name] for name in FIGURES},
        }
        if curves:
            grid = np.linspace(0, points[-1]["tokens"], POINTS)
            found[method]["curve"] = [[round(t), round(at_tokens(points, t)["ndcg@10"], 4)] for t in grid]
    return found


def run(settings: Settings, seeds: Sequence[int], chosen: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Every pool and seed, a row each."""
    rows = []
    for seed in seeds:
        started = time.perf_counter()
        source = KnownKinds(seed, {"useful": 1})
        policy = warm_policy(settings, source)
        print(f"seed {seed}: warm start {time.perf_counter() - started:.1f} s", file=sys.stderr)
        for name, shares in chosen.items():
            started = time.perf_counter()
            counts = counts_of(shares, settings.n_pool)
            results = run_pool(settings, source.with_pool(counts), policy, name == drawn(list(chosen)))
            rows.append({"pool": name, "seed": seed, "counts": counts, "methods": results})
            print(f"seed {seed}, {name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment and writes the JSON, the Markdown and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="of data, weights, order and rollouts: 0, 1, ...")
    parser.add_argument("--report", action="store_true", help="only write Markdown and picture anew from the JSON")
    parser.add_argument("--json", type=Path, default=RESULTS / "known_pool.json", metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not options.report:
        write_json(options.json, measured(Settings(), list(range(options.seeds)), pools()))
    result = json.loads(options.json.read_text())
    text = report(result, options.json.with_suffix(".png").name)
    write_atomically(options.json.with_suffix(".md"), lambda path: path.write_text(text, encoding="utf-8"))
    write_atomically(options.json.with_suffix(".png"), lambda path: plot(result, path))
    print(text)


def measured(settings: Settings, seeds: list[int], chosen: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What the JSON holds."""
    about = machine()
    rows = run(settings, seeds, chosen)
    return {
        "command": f"python benchmarks/known_pool.py --seeds {len(seeds)}",
        "machine": about,
        "threads": 1,
        "date": date.today().isoformat(),
        "cpu_seconds": round(time.process_time(), 1),
        "seeds": seeds,
        "settings": asdict(settings),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
