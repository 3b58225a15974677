"""Hidden-state Hessian-vector products: the closed form against double backward, sample by sample."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirec_pl.selection.probes.gradients import head_hvp

GOAL = 10.0
TEMPERATURE = 0.05
SEED = 0
CHUNK = 16  # samples whose item vectors exist at a time


def _draw(sample_ids: range, dim: int, n_items: int, negatives: int) -> tuple[Tensor, Tensor]:
    """(states [B, D], item numbers [B, 1 + negatives], target first) that depend on (seed, sample_id) alone."""
    states, items = [], []
    for sample_id in sample_ids:
        numbers = np.random.default_rng([SEED, sample_id])
        states.append(numbers.standard_normal(dim, dtype=np.float32))
        items.append(numbers.choice(n_items, 1 + negatives, replace=False))
    return torch.from_numpy(np.stack(states)), torch.from_numpy(np.stack(items))


def _closed_form(hidden: Tensor, vectors: Tensor) -> Tensor:
    target = torch.zeros(len(hidden), dtype=torch.int64)
    return head_hvp(hidden, vectors, target, temperature=TEMPERATURE, cosine=True)


def _double_backward(hidden: Tensor, vectors: Tensor, target: Tensor | None = None) -> Tensor:
    """One sample after the other, l = -p / stop_gradient(p) and d(g.g)/dh by autograd, as the authors' code does."""
    products = []
    places = [0] * len(hidden) if target is None else target.tolist()
    for state, own, place in zip(hidden, vectors, places, strict=True):
        h = state.clone().requires_grad_()
        p = (own @ torch.nn.functional.normalize(h, dim=0) / TEMPERATURE).softmax(dim=0)[place]
        (gradient,) = torch.autograd.grad(-p / p.detach(), h, create_graph=True)
        products.append(torch.autograd.grad((gradient * gradient).sum(), h)[0])
    return torch.stack(products)


def _pass(
    method: Callable[[Tensor, Tensor], Tensor], n: int, cache: Tensor, negatives: int
) -> tuple[Tensor, float, float]:
    """Signals of the first n samples, seconds for them, and seconds for gathering their vectors from the cache."""
    parts, signal_seconds, gather_seconds = [], 0.0, 0.0
    buffer = torch.empty(CHUNK * (1 + negatives), cache.shape[1])
    for start in range(0, n, CHUNK):
        ids = range(start, min(start + CHUNK, n))
        hidden, items = _draw(ids, cache.shape[1], len(cache), negatives)
        started = time.perf_counter()
        flat = buffer[: items.numel()]
        torch.index_select(cache, 0, items.flatten(), out=flat)
        vectors = flat.view(len(ids), 1 + negatives, -1)
        gathered = time.perf_counter()
        parts.append(method(hidden, vectors))
        signal_seconds += time.perf_counter() - gathered
        gather_seconds += gathered - started
    return torch.cat(parts), signal_seconds, gather_seconds


def _in_batch(n: int, dim: int, negatives: int, baseline: int) -> dict[str, float]:
    """Seconds for n samples in batches whose items are each other's negatives, as in the published code."""
    size = 1 + negatives
    random = torch.Generator().manual_seed(SEED)
    seconds = {"closed_form": 0.0, "double_backward": 0.0}
    counted = dict.fromkeys(seconds, 0)
    target = torch.arange(size)
    for start in range(-size, n, size):  # the first batch warms up
        hidden = torch.randn(size, dim, generator=random)
        vectors = torch.nn.functional.normalize(torch.randn(size, dim, generator=random), dim=1)
        started = time.perf_counter()
        ours = head_hvp(hidden, vectors, target, temperature=TEMPERATURE, cosine=True)
        ended = time.perf_counter()
        if start >= 0:
            seconds["closed_form"] += ended - started
            counted["closed_form"] += size
        if counted["double_backward"] >= baseline:
            continue
        started = time.perf_counter()
        truth = _double_backward(hidden, vectors.expand(size, -1, -1), target)
        if start >= 0:
            seconds["double_backward"] += time.perf_counter() - started
            counted["double_backward"] += size
        if not float((ours - truth).abs().max()) < 1e-4 * float(truth.abs().max()):
            raise AssertionError("the two differ where the negatives are those of the batch")
    return {name: total * n / counted[name] for name, total in seconds.items()}


def run(
    threads: int,
    n: int = 10_000,
    dim: int = 2304,
    negatives: int = 64,
    baseline: int = 400,
    n_items: int = 4096,
) -> dict[str, Any]:
    """Times both on the same samples; double backward on the first `baseline` of them, extrapolated to n."""
    torch.set_num_threads(threads)
    cache = torch.from_numpy(np.random.default_rng(SEED).standard_normal((n_items, dim), dtype=np.float32))
    cache = torch.nn.functional.normalize(cache, dim=1)
    for method in (_closed_form, _double_backward):
        _pass(method, 2 * CHUNK, cache, negatives)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    truth, slow, slow_gather = _pass(_double_backward, baseline, cache, negatives)
    ours, fast, gather = _pass(_closed_form, n, cache, negatives)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = float((ours[:baseline] - truth).abs().max() / truth.abs().max())
    if not error < 1e-4:
        raise AssertionError(f"the two differ by {error:.1e} of the largest value")
    in_batch = _in_batch(n, dim, negatives, baseline)
    slow, slow_gather = slow * n / baseline, slow_gather * n / baseline
    return {
        "n": n,
        "dim": dim,
        "negatives": negatives,
        "threads": threads,
        "baseline_samples": baseline,
        "largest_difference": error,
        "seconds": {"closed_form": fast, "double_backward": slow},
        "seconds_with_gathering": {"closed_form": fast + gather, "double_backward": slow + slow_gather},
        "seconds_in_batch": in_batch,
        "ratio_in_batch": in_batch["double_backward"] / in_batch["closed_form"],
        "ratio": slow / fast,
        "ratio_with_gathering": (slow + slow_gather) / (fast + gather),
        "peak_mb": peak / 1024,
        "peak_above_setup_mb": (peak - before) / 1024,
    }


def markdown(result: dict[str, Any]) -> str:
    """A section with what was measured and how far the goal was met."""
    plain, gathering = result["seconds"], result["seconds_with_gathering"]
    met = "reached" if result["ratio"] >= GOAL else "missed"
    met_gathering = "reached" if result["ratio_with_gathering"] >= GOAL else "missed"
    return "\n".join(
        [
            "### Hessian-vector products at the hidden state",
            "",
            f"{result['n']:,} samples, d = {result['dim']:,}, {result['negatives']} negatives each, "
            f"{result['threads']} thread(s), float32, softmax of cosines / 0.05; the unit item vectors of "
            f"{CHUNK} samples exist at a time. Double backward ran sample by sample on {result['baseline_samples']} of "
            "them and is extrapolated. On these the two differ by "
            f"{result['largest_difference']:.0e} of the largest value.",
            "",
            "| | double backward, s | closed form, s | ratio | goal: 10 |",
            "|---|---|---|---|---|",
            f"| negatives of the batch, as published | {result['seconds_in_batch']['double_backward']:.2f} "
            f"| {result['seconds_in_batch']['closed_form']:.2f} | {result['ratio_in_batch']:.1f} "
            f"| {'reached' if result['ratio_in_batch'] >= GOAL else 'missed'} |",
            f"| negatives of each sample's own, vectors at hand | {plain['double_backward']:.2f} "
            f"| {plain['closed_form']:.2f} | {result['ratio']:.1f} | {met} |",
            f"| the same, with gathering them from a cache of items | {gathering['double_backward']:.2f} "
            f"| {gathering['closed_form']:.2f} | {result['ratio_with_gathering']:.1f} | {met_gathering} |",
            "",
            f"Peak memory of the process {result['peak_mb']:,.0f} MB, {result['peak_above_setup_mb']:,.0f} MB above "
            "what it held before.",
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    measured = run(options.threads)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(measured, file, indent=2)
    print(markdown(measured))
