"""Max-min selection: high scores that are far from each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minirec_pl.errors import InputError
from minirec_pl.selection.signals import Array, as_ids

_CANDIDATES = 1024  # rows followed pick by pick
_PICKS = 128  # picks after which the other rows catch up, in one matrix product
_ROWS = 16_384  # rows of that product at a time
_TIE = {torch.float64: 1e-12, torch.float32: 1e-6}  # values this close, relative to the largest score, are tied


class Selection(NamedTuple):
    """A greedy pick, best first.

    Attributes:
        indices: [k] int64, row positions.
        novelty: [k] float64 in [0, 2], the distance 1 - cos to the nearest earlier pick; 1 for a first pick.
    """

    indices: Tensor
    novelty: Tensor


def _unit_rows(embeddings: Array) -> Tensor:
    rows = torch.as_tensor(embeddings).detach()
    if rows.ndim != 2:
        raise InputError(f"embeddings must have the shape [N, D], not {list(rows.shape)}.")
    rows = rows if rows.dtype == torch.float64 else rows.float()
    finite = torch.isfinite(rows).all(dim=1)
    if not finite.all():
        raise InputError(f"the embedding in row {int((~finite).nonzero()[0])} is NaN or infinite.")
    if not rows.numel():
        return rows
    largest = rows.abs().amax(dim=1, keepdim=True)
    rows = rows / largest.where(largest > 0, torch.ones_like(largest))  # so that no square over- or underflows
    unit: Tensor = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(0.5)
    return unit


def _first_near_max(values: Tensor, tie: float) -> int:
    return int((values >= values.max() - tie).byte().argmax())


def maxmin_select(
    embeddings: Array, scores: Array, k: int, *, initial: Array | Sequence[int] | None = None
) -> Selection:
    """Exact greedy selection of rows that score high and are unlike each other.

    Each step takes the row of the largest V(x | S) = d(x | S) score(x) with d(x | S) = min over s in S of
    (1 - cos(e_x, e_s)) (MiniRec, arXiv 2602.04278); the first is argmax(score). Ties go to the smaller row. The first k
    picks of a larger selection are the selection of size k. A zero embedding has the cosine 0, so the distance 1, to
    every row.

    Distances only shrink while S grows, so an old value bounds the present one: between matrix products only the rows
    with the largest bounds are followed, until one of the others could win.

    Args:
        embeddings: [N, D] float; computed in float64 if given in it, else in float32.
        scores: [N] float, not negative.
        k: Number of picks.
        initial: Rows that are in S already; they are not picked.

    Returns:
        Row positions in the order of picking, and the novelty of each when it was picked.

    Raises:
        InputError: If a value is NaN, infinite or (scores) negative, a shape does not fit, or fewer than k rows
            are left.

    Example:
        >>> maxmin_select(torch.eye(3)[[0, 0, 1]], torch.tensor([1.0, 0.9, 0.1]), 2).indices.tolist()
        [0, 2]
    """
    unit = _unit_rows(embeddings)
    n = len(unit)
    score = torch.as_tensor(scores).detach().to(unit.device, torch.float64)
    if score.shape != (n,):
        raise InputError(f"scores must have the shape [{n}], one per embedding, not {list(score.shape)}.")
    if not torch.isfinite(score).all() or (score < 0).any():
        bad = ~(torch.isfinite(score) & (score >= 0))
        raise InputError(f"the score in row {int(bad.nonzero()[0])} is NaN, infinite or negative.")
    pending = [] if initial is None else as_ids(initial).tolist()
    if len(set(pending)) < len(pending) or not all(0 <= row < n for row in pending):
        raise InputError(f"initial must hold distinct rows in 0..{n - 1}.")
    if not 1 <= k <= n - len(pending):
        raise InputError(f"k must lie in 1..{n - len(pending)}, the number of rows to pick from, not {k}.")

    picks: list[int] = []
    novelty: list[float] = []
    largest = float(score.max())
    tie = _TIE[unit.dtype] * largest
    closed = torch.zeros(n, dtype=torch.bool, device=unit.device)
    closed[pending] = True
    distance = torch.full((n,), torch.inf, dtype=torch.float64, device=unit.device)
    if not pending:
        first = _first_near_max(score, _TIE[torch.float64] * largest)
        picks, novelty, pending = [first], [1.0], [first]
        closed[first] = True

    while len(picks) < k:
        _approach(distance, unit, pending)
        value = (distance * score).masked_fill(closed, -torch.inf)
        bounds, rows = value.topk(min(_CANDIDATES + 1, n))
        rival = float(bounds[_CANDIDATES]) if n > _CANDIDATES else -torch.inf
        rows = rows[:_CANDIDATES].sort().values
        near = unit[rows]
        near_distance, near_score, near_closed = distance[rows], score[rows], closed[rows]
        pending = []
        while len(picks) < k and len(pending) < _PICKS:
            near_value = (near_distance * near_score).masked_fill_(near_closed, -torch.inf)
            if rival < float(near_value.max()) - tie:
                place = _first_near_max(near_value, tie)
                pick, gap = int(rows[place]), float(near_distance[place])
                near_closed[place] = True
            elif not pending:  # all values are exact here: look at every row, because a rival may tie
                pick = _first_near_max(value, tie)
                gap = float(distance[pick])
                near_closed[rows == pick] = True
            else:
                break
            closed[pick] = True
            picks.append(pick)
            novelty.append(gap)
            pending.append(pick)
            torch.minimum(near_distance, (1 - (near @ unit[pick]).double()).clamp_min_(0), out=near_distance)
    return Selection(torch.tensor(picks, dtype=torch.int64), torch.tensor(novelty, dtype=torch.float64))


def _approach(distance: Tensor, unit: Tensor, picks: list[int]) -> None:
    chosen = unit[picks].T.contiguous()
    for start in range(0, len(unit), _ROWS):
        rows = slice(start, start + _ROWS)
        nearest = (unit[rows] @ chosen).amax(dim=1)
        torch.minimum(distance[rows], (1 - nearest.double()).clamp_min_(0), out=distance[rows])


def nearest_pick(embeddings: Array, picks: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the picked rows for every row: position in `picks` [N] and distance [N]."""
    unit = _unit_rows(embeddings)
    best = torch.full((len(unit),), torch.inf, dtype=torch.float64)
    at = torch.zeros(len(unit), dtype=torch.int64)
    for s in range(0, len(unit), _ROWS):
        d = (1 - (unit[s : s + _ROWS] @ unit[picks].T).double()).clamp_min(0)
        best[s : s + _ROWS], at[s : s + _ROWS] = d.min(dim=1)
    return at, best
