"""Which of the samples that were not picked are redundant, and with which pick."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from minirec_pl.selection.diversity import nearest_pick
from minirec_pl.selection.reasons import BELOW_BUDGET, REDUNDANT, SELECTED
from minirec_pl.selection.signals import Array


def name_redundant(columns: dict[str, npt.NDArray[Any]], embeddings: Array) -> None:
    """Tells the redundant samples of a ledger from those below the budget; see `MiniRecSelector` for the rule.

    Args:
        columns: [N] arrays of a ledger by column, `reason`, `redundant_with`, `novelty` and `value` changed in place.
        embeddings: [N, E], of the same rows.
    """
    ranked = np.flatnonzero(columns["reason"] == SELECTED)
    picks = ranked[np.argsort(columns["rank"][ranked])]
    if not len(picks):
        return
    typical = np.sort(columns["novelty"][picks])[(len(picks) - 1) // 2]
    worth = columns["score"] * typical >= columns["value"][picks[-1]]
    rows = np.flatnonzero(worth & (columns["reason"] == BELOW_BUDGET))
    if not len(rows):
        return
    nearest = nearest_pick(embeddings, picks, rows=rows)
    distance = nearest.distance.numpy()
    columns["reason"][rows] = REDUNDANT
    columns["redundant_with"][rows] = columns["sample_id"][picks[nearest.position.numpy()]]
    columns["novelty"][rows] = distance
    columns["value"][rows] = distance * columns["score"][rows]
