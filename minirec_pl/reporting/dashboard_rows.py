"""The figures and tables that `SelectionDashboard` logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from minirec_pl.reporting.workspace import LEDGER, PLAN, TERMS
from minirec_pl.selection.session.run_files import plan_table
from minirec_pl.utils.cost import Cost

if TYPE_CHECKING:
    from minirec_pl.selection.session.session import SelectionSession

Floats: TypeAlias = npt.NDArray[np.float64]
Histograms: TypeAlias = dict[str, tuple[Floats, Floats]]
GROUPS = ("pool", "picks")
_BINS = 40


def totals(cost: Cost) -> dict[str, float]:
    """Sums rollouts, tokens and seconds of all phases so far, by the names that are logged."""
    return {f"cost/{name}": float(value) for name, value in cost.totals().items()}


def phases(cost: Cost) -> dict[str, float]:
    """Lists the same by phase, where no other callback logs it."""
    tokens = {name: cost.tokens_forward[name] + cost.tokens_backward[name] for name in cost.tokens_forward}
    return {
        **{f"cost/{name}_rollouts": float(cost.rollouts[name]) for name in ("scoring", "training")},
        **{f"cost/{name}_tokens": float(tokens[name]) for name in ("warm_start", "scoring", "training")},
        **{f"cost/{name}_seconds": cost.seconds[name] for name in ("warm_start", "training")},
    }


def term_histograms(table: pd.DataFrame, selected: Sequence[int]) -> Histograms:
    """Collects the known values of each term of a ledger, of pool and picks, and the edges of the pool's bins.

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
    """Keeps at most so many rows of a ledger, in its order: the picks, best first, then others at even distances."""
    if len(table) <= most:
        return table
    rank = table["rank"].to_numpy(dtype="float64", na_value=np.inf)
    picks = np.argsort(rank, kind="stable")[: min(most, int(np.isfinite(rank).sum()))]
    others, n_others = np.flatnonzero(np.isinf(rank)), most - len(picks)
    kept = others[np.arange(n_others) * len(others) // max(1, n_others)]
    return table.iloc[np.sort(np.concatenate([picks, kept]))]


def wandb_row(session: SelectionSession, histograms: Histograms | None, step: int, max_rows: int) -> dict[str, Any]:
    """Makes what W&B is given of a plan, and of the selection before it if that is new.

    Args:
        session: that has planned an epoch; it has a ledger if there are histograms.
        histograms: of a new selection, see `term_histograms`; None if it was shown before.
        step: optimizer steps so far.
        max_rows: of the ledger's table.
    """
    import wandb

    from minirec_pl.reporting.wandb_table import FrameTable

    row: dict[str, Any] = {"epoch": session.plan_epoch, "trainer/global_step": step}
    if histograms is not None:
        assert session.ledger is not None
        row[LEDGER] = FrameTable(table_rows(session.ledger.table, max_rows), LEDGER)
        for name, (values, edges) in histograms.items():
            row[name] = wandb.Histogram(np_histogram=np.histogram(values, edges))
    if session.plan:
        row[PLAN] = FrameTable(plan_table(session).drop(columns="epoch"), PLAN)
    return row
