"""Oracles: rollouts written out one by one."""

import math

import numpy as np
import pytest

from minirec_pl.selection import calibration


def test_figures_equal_those_of_single_rollouts():
    random = np.random.default_rng(0)
    predicted, hits = random.uniform(size=40).round(1), random.integers(0, 5, size=40).astype(float)
    misses = 4 - hits
    found = calibration(predicted, hits, misses, bins=7)
    rollouts = [(p, y) for p, h in zip(predicted, hits, strict=True) for y in [1] * int(h) + [0] * (4 - int(h))]
    mean = sum(y for _, y in rollouts) / len(rollouts)
    assert found.brier == pytest.approx(sum((p - y) ** 2 for p, y in rollouts) / len(rollouts))
    assert found.brier_of_mean == pytest.approx(sum((mean - y) ** 2 for _, y in rollouts) / len(rollouts))
    pairs = [(p > q) + 0.5 * (p == q) for p, y in rollouts for q, z in rollouts if y == 1 and z == 0]
    assert found.auc == pytest.approx(sum(pairs) / len(pairs))
    assert len(found.predicted) == 7
    assert found.predicted == sorted(found.predicted)
    order = sorted(range(40), key=lambda i: (predicted[i], i))[:6]
    assert found.observed[0] == pytest.approx(sum(hits[i] for i in order) / 24)


def test_what_cannot_be_known_is_left_out():
    nothing = calibration(np.empty(0), np.empty(0), np.empty(0))
    assert nothing.groups == 0
    assert math.isnan(nothing.brier)
    assert nothing.figures() == {}
    misses = calibration(np.array([0.5, 0.1]), np.zeros(2), np.full(2, 8.0))
    assert math.isnan(misses.auc)
    assert set(misses.figures()) == {
        "selection/predicted_brier",
        "selection/predicted_brier_of_mean",
        *(f"selection/predicted_reliability/{name}_{bin_}" for name in ("mean", "observed") for bin_ in (1, 2)),
    }
