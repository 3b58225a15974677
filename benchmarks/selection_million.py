"""A million embeddings in a float16 file: time and peak memory of `maxmin_select`, ratio to the plain greedy.

Each run is a process of its own. The file is written just before, so the system may still have it in memory; the peak
counts the pages of the file that are mapped. The plain greedy holds unit rows in float32 and is timed over its first
picks, without the making of those rows; its cost a pick is constant, so the rest is extrapolated.

Run as a program it is one such process: `selection_million.py lazy|plain FILE N D K SCORES THREADS`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import GIB, cell, peak_memory, ratio_cell, summary
from selection_maxmin import embedding_blocks, plain_greedy, scores_of, unit_rows

from minirec_pl.selection import maxmin_select

PLAIN_PICKS = 200


def run(threads: int, *, n: int = 1_000_000, d: int = 256, k: int = 10_000, repeats: int = 1) -> dict[str, Any]:
    """Measures, with a temporary file of 2 N d bytes."""
    result: dict[str, Any] = {"n": n, "d": d, "k": k, "plain_picks": min(PLAIN_PICKS, k), "problems": []}
    for kind in ("clustered", "isotropic"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "embeddings.f16"
            with path.open("wb") as file:
                for block in embedding_blocks(kind, n, d):
                    file.write(block.half().numpy().tobytes())
            runs: dict[str, list[dict[str, float]]] = {"plain": [], "lazy, uniform": [], "lazy, equal": []}
            for _ in range(repeats):
                for name, done in runs.items():
                    rival, _, scores = name.partition(", ")
                    arguments = [rival, path, n, d, k, scores or "uniform", threads]
                    command = [sys.executable, __file__, *map(str, arguments)]
                    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                    done.append(json.loads(output))
        problem = {
            name: summary([one["seconds"] for one in done]) | {"peak": max(one["peak"] for one in done)}
            for name, done in runs.items()
        }
        result["problems"].append({"embeddings": kind} | problem)
    return result


def markdown(result: dict[str, Any]) -> str:
    """One table."""
    n, d, k = result["n"], result["d"], result["k"]
    lines = [
        f"N = {n:,}, d = {d:,}, k = {k:,}, float16 from a memory-mapped file of {2 * n * d / GIB:.2f} GiB. Seconds: "
        f"minimum / median. The plain greedy is extrapolated from its first {result['plain_picks']} picks.",
        "",
        "| embeddings | scores | plain greedy | `maxmin_select` | times faster | peak memory, plain | peak memory, "
        "`maxmin_select` |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in result["problems"]:
        plain = {name: p["plain"][name] * k / result["plain_picks"] for name in ("min", "median")}
        for scores in ("uniform", "equal"):
            lazy = p[f"lazy, {scores}"]
            peaks = f"{p['plain']['peak'] / GIB:.2f} GiB | {lazy['peak'] / GIB:.2f} GiB"
            times = f"{cell(plain)} | {cell(lazy)} | {ratio_cell(plain, lazy)}"
            lines.append(f"| {p['embeddings']} | {scores} | {times} | {peaks} |")
    return "\n".join(lines)


def _one(rival: str, path: str, n: int, d: int, k: int, scores: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    embeddings = np.memmap(path, dtype=np.float16, mode="r", shape=(n, d))
    score = scores_of(scores, n)
    if rival == "plain":
        unit = torch.empty(n, d)
        for start in range(0, n, 50_000):
            unit[start : start + 50_000] = unit_rows(
                torch.from_numpy(embeddings[start : start + 50_000].copy()).float()
            )
        score32 = torch.from_numpy(score).float()
        started = time.perf_counter()
        plain_greedy(unit, score32, min(PLAIN_PICKS, k))
    else:
        started = time.perf_counter()
        maxmin_select(embeddings, score, k)
    return {"seconds": time.perf_counter() - started, "peak": peak_memory()}


if __name__ == "__main__":
    which, file_path, *sizes, score_kind, n_threads = sys.argv[1:]
    print(json.dumps(_one(which, file_path, *map(int, sizes), score_kind, int(n_threads))))
