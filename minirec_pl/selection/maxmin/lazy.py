"""The lazy greedy loop behind `maxmin_select`."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from minirec_pl.selection.maxmin.unit_rows import PICKS, Floats, Ints, UnitRows

Cosines: TypeAlias = npt.NDArray[np.floating[Any]]

_CANDIDATES = 2**20  # numbers in the block of candidates: 4 MiB of float32
_FEWEST, _MOST = 512, 4096  # candidates
_FEW = 128  # candidates of the highest values, which are compared with each other
_SLACK = {torch.float64: 1e-12, torch.float32: 1e-6}  # distances this close are equal: rounding of the products


def slack_of(unit: UnitRows) -> float:
    """Returns how far rounding may move a distance between two of these rows."""
    return _SLACK[unit.dtype]


class LazyGreedy:
    """Greedy selection by V(x | S) = d(x | S) score(x), comparing a row with a pick only where that can matter.

    d(x | S) shrinks as S grows, so the value of a row taken some picks ago bounds its current one. Each row keeps the
    number of picks that it has been compared with, and catches up when its bound is among the highest. A round brings
    the highest few hundred up to date, and picks among them while the best beats the bound of every other row.

    Rows whose value is the highest up to `slack_of` times their score are tied, and the smallest of them is picked.

    Attributes:
        picks: Positions in the order of picking.
        novelty: Distance of each pick to the nearest earlier one when it was picked; 1 for a first pick.
    """

    def __init__(self, unit: UnitRows, score: Floats, chosen: Ints) -> None:
        """Starts with a set S.

        Args:
            unit: N rows.
            score: [N], finite, not negative.
            chosen: [m] positions in S already; if there are none the row of the highest score becomes the first pick.
        """
        self.picks: list[int] = []
        self.novelty: list[float] = []
        self._unit = unit
        self._score = score
        self._slack = slack_of(unit)
        self._margin = self._slack * score
        self._set = chosen
        self._seen = np.zeros(len(score), dtype=np.int32)
        self._near = torch.full((len(score),), -1.0, dtype=unit.dtype).numpy()  # cosine to the nearest pick
        self._bound = 2.0 * score
        self._width = min(max(_CANDIDATES // max(unit.columns, 1), _FEWEST), _MOST)
        if not len(self._set):
            first = int((score >= score.max() * (1 - 1e-12)).argmax())
            self.picks, self.novelty = [first], [1.0]
            self._set = np.array([first])
        self._bound[self._set] = -np.inf

    def round(self, k: int) -> None:
        """Picks at least one more row, and as many as can be told without looking at other rows, up to k in all.

        Args:
            k: More than `picks` has now and not more than there are rows.
        """
        if self._bound.max() == 0.0:  # nothing is worth anything, now or later
            self._pick_tied(0.0, k)
            return
        rows = self._candidates()
        best = float(self._bound[rows].max())
        others = self._bound + self._margin
        others[rows] = -np.inf
        rival = float(others.max())
        if rival < best:
            self._pick_among(rows, k, rival=rival)
        else:
            self._pick_tied(best, k)

    def _candidates(self) -> Ints:
        """Rows with exact values that are above the bound of every other row, up to the slack, ascending."""
        n, width, done = len(self._score), self._width, len(self._set)
        size = width
        bounds = torch.from_numpy(self._bound)
        while True:
            top, places = bounds.topk(min(size + 1, n))
            rest = float(top[size]) if size < n else -np.inf
            rows = places[:size].numpy()
            rows = rows[self._bound[rows] > -np.inf]
            stale = self._seen[rows] < done
            exact = self._bound[rows[~stale]]  # descending
            self._catch_up(rows[stale], floor=exact[width - 1] if len(exact) >= width else -np.inf)
            rows = rows[self._seen[rows] == done]
            value = self._bound[rows]
            above = rows[value > rest]
            if 4 * len(above) >= width or size >= n:
                break
            if len(rows) and value.max() >= rest >= value.max() * (1 - self._slack):
                above = rows
                break
            size *= 2
        if len(above) > width:
            value = self._bound[above]
            above = above[np.argpartition(value, len(above) - width)[len(above) - width :]]
        return np.sort(above)

    def _pick_tied(self, best: float, k: int) -> None:
        """Picks the smallest of the many rows whose value is `best`, the highest there is, up to the slack."""
        rows = np.flatnonzero(self._bound + self._margin >= best)
        found: list[Ints] = []
        for start in range(0, len(rows), self._width):
            part = rows[start : start + self._width]
            self._catch_up(part)
            found.append(part[self._bound[part] + self._margin[part] >= best])
            if sum(map(len, found)) >= self._width:
                break
        self._pick_among(np.concatenate(found), k, level=best)

    def _catch_up(self, rows: Ints, floor: float = -np.inf) -> None:
        """Compares rows with the picks they have not seen; those that fall below `floor` on the way are left there."""
        done = len(self._set)
        rows = np.sort(rows)
        rows = rows[np.argsort(self._seen[rows], kind="stable")]
        step = self._unit.block_rows()
        for block in (rows[at : at + step] for at in range(0, len(rows), step)):
            start = int(self._seen[block[0]])
            unit = self._unit.take(block) if start < done else None
            while unit is not None and len(block) and start < done:
                stop = min(start + PICKS, done)
                behind = block[: int(np.searchsorted(self._seen[block], stop))]
                near = (unit[: len(behind)] @ self._unit.take(self._set[start:stop]).T).amax(dim=1)
                self._near[behind] = np.maximum(self._near[behind], cosine_of(near, self._slack))
                self._bound[behind] = distance_of(self._near[behind]) * self._score[behind]
                self._seen[behind] = stop
                alive = np.flatnonzero(self._bound[block] > floor)
                if 2 * len(alive) < len(block):
                    block, unit = block[alive], unit[alive]
                start = stop

    def _pick_among(self, rows: Ints, k: int, *, rival: float = -np.inf, level: float | None = None) -> None:
        """Picks among exact rows, ascending, while no other row can win.

        A few rows of the highest values are compared with each other, and all with the picks among those at once.

        Args:
            rows: The candidates.
            k: Picks in all.
            rival: Highest bound of the other rows, slack included; picking continues while the best is above it.
            level: If given, the highest value of all. The smallest row that has it up to the slack is picked, and
                picking continues while a candidate has all of it; other rows that have it come after the candidates.
        """
        unit = self._unit.take(rows)
        near, score, margin, value = self._near[rows], self._score[rows], self._margin[rows], self._bound[rows]
        before = len(self.picks)
        while len(self.picks) < k and len(rows):
            upper = value + margin
            highest = float(value.max())
            best = highest if level is None else level
            if best <= rival or upper.max() < best or (len(self.picks) > before and highest < best):
                break
            few = np.sort(np.argpartition(value, -_FEW)[-_FEW:]) if len(rows) > _FEW else np.arange(len(rows))
            other, tie = max(rival, float(np.delete(upper, few).max(initial=-np.inf))), None
            if level is not None or other >= best:
                few, other, tie = np.flatnonzero(upper >= best)[:_FEW], -np.inf, best
            picked = self._pick_few(rows[few], unit[few], k, rival=other, level=tie, near=near[few], score=score[few])
            chosen = few[picked]
            np.maximum(near, cosine_of((unit @ unit[chosen].T).amax(dim=1), self._slack), out=near)
            near[chosen], score[chosen] = np.inf, 1.0  # closes the rows
            value = distance_of(near) * score
            self._near[rows], self._bound[rows] = near, value
            self._set = np.concatenate([self._set, rows[chosen]])
            self._seen[rows] = len(self._set)
            alive = np.flatnonzero(value + margin > rival)
            if 4 * len(alive) < 3 * len(rows):
                rows, unit, near, score = rows[alive], unit[alive], near[alive], score[alive]
                margin, value = margin[alive], value[alive]

    def _pick_few(
        self, rows: Ints, unit: torch.Tensor, k: int, *, rival: float, level: float | None, near: Cosines, score: Floats
    ) -> list[int]:
        """Picks among few exact rows as `_pick_among` does, and overwrites `score`; returns their places in `rows`."""
        away = distance_of(cosine_of(unit @ unit.T, self._slack))
        margin, distance = self._margin[rows], distance_of(near)
        value, widest = distance * score, float(margin.max())
        picked: list[int] = []
        while len(self.picks) + len(picked) < k:
            place = int(value.argmax())
            best = float(value[place]) if level is None else level
            if best <= rival or value[place] + margin[place] < best or (picked and value[place] < best):
                break
            if level is not None or (place and value[value[:place].argmax()] + widest >= best):
                place = int((value + margin >= best).argmax())
            picked.append(place)
            self.novelty.append(float(distance[place]))
            np.minimum(distance, away[place], out=distance)
            distance[place], score[place] = -np.inf, 1.0
            np.multiply(distance, score, out=value)
        self.picks += rows[picked].tolist()
        return picked


def cosine_of(product: torch.Tensor, slack: float) -> Cosines:
    """Moves products of rows of length 1 to the CPU and makes those 1 that rounding cannot tell from 1."""
    found: Cosines = product.cpu().numpy()
    found[found > 1.0 - slack] = 1.0
    return found


def distance_of(cosine: Cosines) -> Floats:
    """Returns 1 - cosine in float64."""
    return np.subtract(1.0, cosine, dtype=np.float64)
