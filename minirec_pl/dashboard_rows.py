"""The figures and tables that `SelectionDashboard` logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from minirec_pl.cost import Cost
from minirec_pl.dashboard import TERMS

Floats: TypeAlias = npt.NDArray[np.float64]
GROUPS = ("pool", "picks")
_BINS = 40


def totals(cost: Cost) -> dict[str, float]:
    """Rollouts, tokens and seconds of all phases so far, by the names that are logged."""
    return {f"cost/{name}": float(value) for name, value in cost.totals().items()}


def phases(cost: Cost) -> dict[str, float]:
    """The same by phase, where no other callback logs it."""
    tokens = {name: cost.tokens_forward[name] + cost.tokens_backward[name] for name in cost.tokens_forward}
    return {
        **{f"cost/{name}_rollouts": float(cost.rollouts[name]) for name in ("scoring", "training")},
        **{f"cost/{name}_tokens": float(tokens[name]) for name in ("warm_start", "scoring", "training")},
        **{f"cost/{name}_seconds": cost.seconds[name] for name in ("warm_start", "training")},
    }


def term_histograms(table: pd.DataFrame, selected: Sequence[int]) -> dict[str, tuple[Floats, Floats]]:
    """The known values of each term of a ledger, of the pool and of the picks, and the edges of the pool's bins.

    Args:
        table: of the ledger.
        selected: sample_ids of the picks.
    """
    found = {}
    picked = np.isin(table["sample_id"].to_numpy(), selected)
    for term in TERMS:
        values = table[term].to_numpy()
        known = np.isfinite(values)
        if known.any():
            edges = np.histogram_bin_edges(values[known], _BINS)
            for group, rows in zip(GROUPS, (known, known & picked), strict=True):
                found[f"selection/{term}/{group}"] = (values[rows], edges)
    return found


def table_rows(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many rows of a ledger, in its order: the picks, best first, then others at even distances."""
    if len(table) <= most:
        return table
    rank = table["rank"].to_numpy(dtype="float64", na_value=np.inf)
    picks = np.argsort(rank, kind="stable")[: min(most, int(np.isfinite(rank).sum()))]
    others, n_others = np.flatnonzero(np.isinf(rank)), most - len(picks)
    kept = others[np.arange(n_others) * len(others) // max(1, n_others)]
    return table.iloc[np.sort(np.concatenate([picks, kept]))]
