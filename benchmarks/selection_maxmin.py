"""Max-min selection against the plain greedy: speed, agreement, and what a candidate pool loses.

The plain greedy is what the authors' code does: unit rows in float32, made before the clock starts, the distances to
the nearest pick kept as a vector, one matrix-vector product, one minimum and one argmax a pick. `maxmin_select` is
timed from the raw embeddings on.

Shortfall: how much less a pick is worth than the best row of its step, at most; every value is recomputed in float64.
Loss of a pool: by how much the values of the picks, recomputed likewise, sum to less than without a pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from measuring import alternate, cell, ratio_cell, summary
from torch import Tensor

from minirec_pl.selection import maxmin_select

POOLS = (0.1, 0.2, 0.5)


def embedding_blocks(kind: str, n: int, d: int, *, rows: int = 50_000) -> Iterator[Tensor]:
    """Seeded float32 embeddings: "isotropic" normal, or "clustered" about n / 50 centres (cosine 0.8 within)."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(max(n // 50, 1), d, generator=generator)
    for start in range(0, n, rows):
        block = torch.randn(min(rows, n - start), d, generator=generator)
        if kind == "clustered":
            block = centres[torch.randint(len(centres), (len(block),), generator=generator)] + 0.5 * block
        yield block


def scores_of(kind: str, n: int) -> np.ndarray:
    """Seeded scores: "uniform" in [0, 2], or "equal" ones, which leave the pick to the distances alone."""
    return np.random.default_rng(1).uniform(0, 2, n) if kind == "uniform" else np.ones(n)


def unit_rows(embeddings: Tensor) -> Tensor:
    """Rows of length 1."""
    return embeddings / torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)


def plain_greedy(unit: Tensor, score: Tensor, k: int) -> list[int]:
    """One matrix-vector product a pick."""
    pick = int(score.argmax())
    picks, closed = [pick], torch.zeros(len(score), dtype=torch.bool)
    distance = torch.full_like(score, torch.inf)
    while len(picks) < k:
        closed[pick] = True
        distance = torch.minimum(distance, 1 - unit @ unit[pick])
        pick = int((distance * score).masked_fill_(closed, -torch.inf).argmax())
        picks.append(pick)
    return picks


def values_and_shortfall(unit: Tensor, score: np.ndarray, picks: list[int]) -> tuple[float, float]:
    """Sum of the picks' values, and the largest gap between a pick and the best of its step, in float64."""
    distance, total, shortfall = np.ones(len(score)), 0.0, 0.0
    for start in range(0, len(picks), 128):
        gaps = (1 - unit[picks[start : start + 128]] @ unit.T).numpy()
        for step, gap in enumerate(gaps, start=start):
            value = distance * score
            value[picks[:step]] = -np.inf
            total += value[picks[step]]
            shortfall = max(shortfall, value.max() - value[picks[step]])
            distance = np.minimum(distance if step else np.inf, gap)
    return float(total), float(shortfall)


def run(threads: int, *, n: int = 10_748, d: int = 2_304, k: int = 1_024, repeats: int = 5) -> dict[str, Any]:
    """Measures; the sizes are those of the paper's CDs_and_Vinyl."""
    torch.set_num_threads(threads)
    problems = []
    for kind in ("clustered", "isotropic"):
        embeddings = torch.cat(list(embedding_blocks(kind, n, d)))
        unit = unit_rows(embeddings)
        for scores in ("uniform", "equal"):
            score = scores_of(scores, n)
            problems.append(
                {"embeddings": kind, "scores": scores} | _compare(embeddings, unit, score, k=k, repeats=repeats)
            )
    return {"n": n, "d": d, "k": k, "problems": problems}


def _compare(embeddings: Tensor, unit: Tensor, score: np.ndarray, *, k: int, repeats: int) -> dict[str, Any]:
    score32 = torch.from_numpy(score).float()
    pools = {f"pool {share:.0%}": max(round(share * len(score)), k) for share in POOLS}
    rivals = {
        "plain": lambda: plain_greedy(unit, score32, k),
        "lazy": lambda: maxmin_select(embeddings, score, k).indices.tolist(),
    } | {
        name: lambda size=size: maxmin_select(embeddings, score, k, pool=size).indices.tolist()
        for name, size in pools.items()
    }
    picks, seconds = alternate(rivals, repeats)
    exact = unit_rows(embeddings.double())
    result: dict[str, Any] = {name: summary(times) for name, times in seconds.items()}
    for name in rivals:
        result[name]["value"], result[name]["shortfall"] = values_and_shortfall(exact, score, picks[name])
        result[name]["same_step"] = sum(a == b for a, b in zip(picks[name], picks["plain"], strict=True))
        result[name]["same_set"] = len(set(picks[name]) & set(picks["plain"]))
    for name in pools:
        result[name]["loss"] = 1 - result[name]["value"] / result["lazy"]["value"]
    return result


def markdown(result: dict[str, Any]) -> str:
    """Two tables: speed and agreement; the pools."""
    lines = [
        f"N = {result['n']:,}, d = {result['d']:,}, k = {result['k']:,}, float32 in memory. Seconds: minimum / median.",
        "",
        "| embeddings | scores | plain greedy | `maxmin_select` | times faster | picks equal at their step | "
        "picks in common | largest shortfall | shortfall, plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in result["problems"]:
        plain, lazy = p["plain"], p["lazy"]
        lines.append(
            f"| {p['embeddings']} | {p['scores']} | {cell(plain)} | {cell(lazy)} | {ratio_cell(plain, lazy)} "
            f"| {lazy['same_step']:,} | {lazy['same_set']:,} | {lazy['shortfall']:.0e} | {plain['shortfall']:.0e} |"
        )
    lines += [
        "",
        "The approximate mode, `maxmin_select(..., pool=M)` with the M highest scores: least seconds, loss of value.",
        "",
        "| embeddings | scores | all rows |" + "".join(f" {share:.0%} of the rows |" for share in POOLS),
        "|---|---|---|" + "---|" * len(POOLS),
    ]
    for p in result["problems"]:
        cells = [f"{p[name]['min']:.3g} s, {p[name]['loss']:.2%}" for name in p if name.startswith("pool")]
        lines.append(f"| {p['embeddings']} | {p['scores']} | {p['lazy']['min']:.3g} s | {' | '.join(cells)} |")
    return "\n".join(lines)
