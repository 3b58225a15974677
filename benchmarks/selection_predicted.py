"""Predicted difficulty: refit, posterior and selection of one epoch, seconds and peak memory.

The pool has eight features and vectors of 32 columns, as `RecDataModule.sample_features` makes them; their making, once
a run, is not timed. Four epochs of k groups of 16 rollouts have been met. Each run is a process of its own.

refit   `PredictedDifficulty.predict` and the prior of the store.
select  the store's view, the Thompson draw, value and max-min selection of `PredictedSelector`.

Run as a program it is one such process: `selection_predicted.py N K THREADS`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from measuring import GIB, cell, peak_memory, summary

from minirec_pl.selection import PredictedSelector, SampleSignals, SignalStore

SIZES = {(100_000, 1_024): (3, None), (100_000, 10_000): (15, None), (1_000_000, 1_024): (20, 2.0)}  # goals: s, GiB
GROUP, EPOCHS, WIDTH, ITEMS = 16, 4, 16, 20_000


def run(threads: int, *, sizes: Sequence[tuple[int, int]] = tuple(SIZES), repeats: int = 3) -> dict[str, Any]:
    """Measures pools of n samples with k picks, each several times."""
    problems = []
    for n, k in sizes:
        command = [sys.executable, __file__, str(n), str(k), str(threads)]
        done = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(repeats)]
        seconds = {name: summary([one[name] for one in done]) for name in ("refit", "select", "whole")}
        problems.append({"n": n, "k": k, **seconds, "peak": max(one["peak"] for one in done)})
    return {"problems": problems}


def markdown(result: dict[str, Any]) -> str:
    """One table."""
    lines = [
        f"Eight features, vectors of {2 * WIDTH} columns, {EPOCHS} epochs of k groups of {GROUP} rollouts met. "
        "Seconds, minimum / median:",
        "",
        "| N | k | refit, s | draw and select, s | together, s | goal, s | peak memory | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in result["problems"]:
        goal, memory = SIZES.get((p["n"], p["k"]), ("", None))
        least = f"{memory:.0f} GiB" if memory else ""
        times = " | ".join(cell(p[name]) for name in ("refit", "select", "whole"))
        lines.append(f"| {p['n']:,} | {p['k']:,} | {times} | {goal} | {p['peak'] / GIB:.2f} GiB | {least} |")
    return "\n".join(lines)


def _one(n: int, k: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    item = (ITEMS * random.random(n) ** 3).astype(np.int64)
    factors = random.normal(size=(ITEMS, WIDTH)).astype(np.float32)
    vectors = np.hstack([factors[item], factors[random.integers(ITEMS, size=n)]])
    names = (
        "log_popularity",
        "similarity",
        "cooccurrence",
        "best_cooccurrence",
        "history_length",
        "age",
        "user_activity",
    )
    features = pd.DataFrame({name: random.normal(size=n) for name in names})
    features["cold"] = (random.random(n) < 0.02).astype(float)
    chance = 1 / (1 + np.exp(4 - features["log_popularity"] - 2 * features["similarity"]))

    selector, store = PredictedSelector(num_generations=GROUP), SignalStore(np.arange(n))
    for epoch in range(EPOCHS):
        ids = np.sort(random.permutation(n)[:k])
        rewards = torch.from_numpy(random.random((k, GROUP)) < chance.to_numpy()[ids, None]).float()
        store.update(SampleSignals(ids, rewards=rewards), epoch=epoch, step=epoch, source="train")

    started = time.perf_counter()
    view = store.pool_view(EPOCHS)
    found = selector.predictor.predict(
        view.hits,
        view.misses,
        features,
        torch.from_numpy(vectors),
        met_at=store.clock("reward_epoch"),
        squared_weights=store.squared_weights,
    )
    store.set_prior(found.mean, found.strength, epoch=EPOCHS, step=EPOCHS)
    refitted = time.perf_counter()
    view = store.pool_view(EPOCHS)
    view.vectors = torch.from_numpy(vectors)
    assert selector.select(view, k, epoch=EPOCHS).n_selected == k
    ended = time.perf_counter()
    return {
        "refit": refitted - started,
        "select": ended - refitted,
        "whole": ended - started,
        "peak": peak_memory(),
    }


if __name__ == "__main__":
    print(json.dumps(_one(*map(int, sys.argv[1:]))))
