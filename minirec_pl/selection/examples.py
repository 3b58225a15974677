"""The samples of a selection that are worth reading."""

from __future__ import annotations

import pandas as pd

from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.reasons import REDUNDANT


def ease_of(ledger: SelectionLedger) -> pd.Series:
    """How easy each sample is, [N] float64 in the order of the ledger, NaN where not known.

    The difficulty in use; where the selector used none, the mean reward. Its name says which.
    """
    table = ledger.table
    return table["difficulty"] if table["difficulty"].notna().any() else table["reward_mean"]


def notable(ledger: SelectionLedger, n: int = 5) -> dict[str, pd.DataFrame]:
    """Rows of a ledger, with `ease` of `ease_of` added.

    Args:
        ledger: of the selection.
        n: rows of each kind at most.

    Returns:
        `easiest` and `hardest`: picks, the extreme one first. `redundant`: samples passed over for being like a pick,
        the nearest first, one of each such pick. `twins`: the picks that those are like, in the order of `redundant`.
    """
    table = ledger.table.assign(ease=ease_of(ledger))
    picks = table[table["rank"].notna() & table["ease"].notna()].sort_values(["ease", "rank"], kind="stable")
    alike = table[table["reason"] == REDUNDANT].sort_values("novelty", kind="stable")
    redundant = alike.drop_duplicates("redundant_with").head(n)
    twins = table.set_index("sample_id", drop=False).loc[redundant["redundant_with"].astype("int64")]
    return {"easiest": picks.tail(n)[::-1], "hardest": picks.head(n), "redundant": redundant, "twins": twins}
