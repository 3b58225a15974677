"""How well predicted solve probabilities agree with the outcomes that followed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """Predictions beside outcomes; a rollout that hits is 1, one that misses 0.

    Attributes:
        groups: groups of rollouts met.
        brier: mean of (prediction - outcome)^2 over the rollouts.
        brier_of_mean: the same of the best constant, the share of these rollouts that hit.
        auc: area under the ROC curve, the probability that a hit was predicted above a miss; NaN where all rollouts are
            hits or all are misses.
        predicted: mean prediction of each bin of the reliability curve, lowest first; bins hold equally many groups.
        observed: share of the bin's rollouts that hit.
    """

    groups: int
    brier: float
    brier_of_mean: float
    auc: float
    predicted: list[float] = field(default_factory=list)
    observed: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Returns what is logged, by name; unknown figures are left out."""
        values = {
            "selection/predicted_brier": self.brier,
            "selection/predicted_brier_of_mean": self.brier_of_mean,
            "selection/predicted_auc": self.auc,
        }
        for name, column in (("mean", self.predicted), ("observed", self.observed)):
            values |= {f"selection/predicted_reliability/{name}_{bin_}": v for bin_, v in enumerate(column, 1)}
        return {name: value for name, value in values.items() if not math.isnan(value)}


def calibration(predicted: Floats, hits: Floats, misses: Floats, bins: int = 10) -> Calibration:
    """Compares predictions that were made before with the outcomes of groups of rollouts.

    Args:
        predicted: [n] solve probability of each group's sample, in [0, 1].
        hits: [n] rollouts of the group that hit; fractions are allowed.
        misses: [n] the others.
        bins: of the reliability curve; fewer where there are fewer groups.

    Returns:
        The figures; NaN and no bins where n is 0.

    Example:
        >>> import numpy as np
        >>> calibration(np.array([0.1, 0.9]), np.array([0.0, 8.0]), np.array([8.0, 0.0]), bins=2).brier
        0.01
    """
    n, size = len(predicted), hits + misses
    rollouts = float(size.sum())
    if not n or not rollouts:
        return Calibration(n, math.nan, math.nan, math.nan)
    brier = float((hits * (1 - predicted) ** 2 + misses * predicted**2).sum()) / rollouts
    mean = float(hits.sum()) / rollouts
    parts = np.array_split(np.argsort(predicted, kind="stable"), min(bins, n))
    return Calibration(
        n,
        round(brier, 15),
        mean * (1 - mean),
        _auc(predicted, hits, misses),
        [float(predicted[rows].mean()) for rows in parts],
        [float(hits[rows].sum() / max(size[rows].sum(), 1e-12)) for rows in parts],
    )


def _auc(predicted: Floats, hits: Floats, misses: Floats) -> float:
    if not hits.any() or not misses.any():
        return math.nan
    from sklearn.metrics import roc_auc_score

    n = len(predicted)
    outcome, weight = np.repeat([1, 0], n), np.concatenate([hits, misses])
    return float(roc_auc_score(outcome, np.tile(predicted, 2), sample_weight=weight))
