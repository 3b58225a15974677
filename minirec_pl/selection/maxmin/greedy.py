"""Max-min selection: high scores that are far from each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from minirec_pl.selection.maxmin.lazy import LazyGreedy, cosine_of, distance_of, slack_of
from minirec_pl.selection.maxmin.unit_rows import PICKS, Floats, Ints, UnitRows, as_matrix, full_precision
from minirec_pl.selection.signals import Array, as_ids
from minirec_pl.utils.errors import InputError


class Selection(NamedTuple):
    """A greedy pick, best first.

    Attributes:
        indices: [k] int64, row positions.
        novelty: [k] float64 in [0, 2], the distance 1 - cos to the nearest earlier pick; 1 for a first pick.
    """

    indices: Tensor
    novelty: Tensor


class NearestPick(NamedTuple):
    """The nearest pick of each row.

    Attributes:
        position: [N] int64, its place in the picks, 0..k-1.
        distance: [N] float64 in [0, 2], the distance 1 - cos to it.
    """

    position: Tensor
    distance: Tensor


def maxmin_select(
    embeddings: Array,
    scores: Array,
    k: int,
    *,
    initial: Array | Sequence[int] | None = None,
    pool: int | None = None,
    progress: bool = False,
) -> Selection:
    """Selects rows greedily that score high and are unlike each other.

    Each step takes the row of the largest V(x | S) = d(x | S) score(x) with d(x | S) = min over s in S of
    (1 - cos(e_x, e_s)) (MiniRec, arXiv 2602.04278); the first is argmax(score). The first k picks of a larger selection
    are the selection of size k. A zero embedding has the cosine 0, so the distance 1, to every row.

    Ties go to the smaller row. Distances that differ by no more than rounding may, about 1e-6 in float32 and 1e-12 in
    float64, are tied, and smaller ones are 0; so a pick is worth the highest value of its step less at most about that
    share of the larger score of the two.

    The embeddings are read in blocks and never copied whole, so they may be a `numpy.memmap` larger than memory. Beside
    them only a few numbers per row are held. Distances only shrink while S grows, so an old value bounds the current
    one, and most rows are compared with few of the picks (`LazyGreedy`).

    With `pool` the selection is approximate: only the rows of the `pool` highest scores (ties to the smaller row) may
    be picked, and no other row is read. The values of the picks then sum to less; `benchmarks/results/selection.md`
    has the loss, under 1 % with the tenth of the highest scores where the scores differ widely, 4 % where they are all
    the same. If the last pick is worth at least twice the highest score left out, nothing is lost.

    Args:
        embeddings: [N, D] of any real dtype, on any device; computed in float64 if given in it, else in float32.
        scores: [N], not negative.
        k: Number of picks.
        initial: Rows that are in S already; they are not picked.
        pool: Number of rows that may be picked, at least k; None means all.
        progress: Whether to show a progress bar on stderr.

    Returns:
        Row positions in the order of picking, and the novelty of each when it was picked.

    Raises:
        InputError: If a value is NaN, infinite or (scores) negative, a shape or dtype does not fit, fewer than k rows
            are left, or the pool is smaller than k.

    Example:
        >>> maxmin_select(torch.eye(3)[[0, 0, 1]], torch.tensor([1.0, 0.9, 0.1]), 2).indices.tolist()
        [0, 2]
    """
    matrix = as_matrix(embeddings)
    n = len(matrix)
    score = _checked_scores(scores, n)
    chosen = as_ids([] if initial is None else initial).numpy()
    if len(np.unique(chosen)) < len(chosen) or ((chosen < 0) | (chosen >= n)).any():
        raise InputError(f"initial holds a row twice or one that does not exist: give distinct rows in 0..{n - 1}")
    if not 1 <= k <= n - len(chosen):
        raise InputError(f"k is {k}: give 1 to {n - len(chosen)}, the number of rows to pick from")
    used = None if pool is None else _highest(score, chosen, pool, k)
    if used is not None:
        score, chosen = score[used], np.searchsorted(used, chosen)

    with full_precision(matrix.device), Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("Selecting", total=k)
        greedy = LazyGreedy(UnitRows(matrix, used), score, chosen)
        while len(greedy.picks) < k:
            greedy.round(k)
            bar.update(task, completed=len(greedy.picks))
    picks = np.array(greedy.picks, dtype=np.int64)
    return Selection(
        torch.from_numpy(picks if used is None else used[picks]), torch.tensor(greedy.novelty, dtype=torch.float64)
    )


def nearest_pick(
    embeddings: Array, picks: Array | Sequence[int], *, rows: Array | Sequence[int] | None = None
) -> NearestPick:
    """Finds the nearest of the picked rows for every row.

    The distance is 1 - cos, so that of `maxmin_select` and of the same precision; ties go to the earlier pick. The
    embeddings are read in blocks and never copied whole.

    Args:
        embeddings: [N, D] of any real dtype, on any device.
        picks: [k] int64 rows, at least one.
        rows: [n] int64 rows that are asked for, ascending; None means all. No others but the picks are read.

    Returns:
        Place among the picks and distance, for each of the n rows asked for, the picks themselves included.

    Raises:
        InputError: If a value is NaN or infinite, a shape or dtype does not fit, or `picks` is empty or out of range.

    Example:
        >>> nearest_pick(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), [0, 1]).position.tolist()
        [0, 1, 1]
    """
    matrix = as_matrix(embeddings)
    n = len(matrix)
    picked = as_ids(picks).numpy()
    if not len(picked) or ((picked < 0) | (picked >= n)).any():
        raise InputError(f"picks is empty or holds a row that does not exist: give at least one, each in 0..{n - 1}")
    asked = np.arange(n) if rows is None else as_ids(rows).numpy()
    used = None if rows is None else np.union1d(asked, picked)
    if used is not None:
        asked, picked = np.searchsorted(used, asked), np.searchsorted(used, picked)
    position, distance = np.zeros(len(asked), dtype=np.int64), np.full(len(asked), np.inf)
    with full_precision(matrix.device):
        unit = UnitRows(matrix, used)
        slack = slack_of(unit)
        for start in range(0, len(asked), unit.block_rows()):
            block = slice(start, start + unit.block_rows())
            here = unit.take(asked[block])
            for first in range(0, len(picked), PICKS):
                cosine = here @ unit.take(picked[first : first + PICKS]).T
                near = cosine.amax(dim=1, keepdim=True)
                place = (cosine >= near - slack).byte().argmax(dim=1).cpu().numpy()
                gap = distance_of(cosine_of(near[:, 0], slack))
                closer = gap < distance[block] - slack
                distance[block][closer], position[block][closer] = gap[closer], first + place[closer]
    return NearestPick(torch.from_numpy(position), torch.from_numpy(distance))


def _checked_scores(scores: Array, n: int) -> Floats:
    score: Floats = torch.as_tensor(scores).detach().to("cpu", torch.float64).numpy()
    if score.shape != (n,):
        raise InputError(f"scores have the shape {list(score.shape)}: give [{n}], one per embedding")
    bad = ~(np.isfinite(score) & (score >= 0))
    if bad.any():
        raise InputError(
            f"the score in row {int(bad.argmax())} is NaN, infinite or negative: give finite scores of at least 0"
        )
    return score


def _highest(score: Floats, chosen: Ints, pool: int, k: int) -> Ints:
    """The rows of the `pool` highest scores that are not in `chosen`, and those in it, ascending."""
    if pool < k:
        raise InputError(f"pool is {pool}: give at least k = {k}")
    ranked = np.argsort(-score, kind="stable")
    ranked = ranked[~np.isin(ranked, chosen)]
    return np.sort(np.concatenate([ranked[:pool], chosen]))
