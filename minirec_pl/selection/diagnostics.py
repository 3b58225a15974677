"""Figures and warnings to look at before trusting a subset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.reasons import BELOW_BUDGET, NEVER_SCORED, REDUNDANT, SELECTED
from minirec_pl.selection.remedies import MOST, NEAR_ZERO, Remedies, Situation
from minirec_pl.utils.errors import InputError

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]
_MANY = 0.25  # share of hopeless picks from which on there is a warning


@dataclass
class Diagnostics:
    """Figures of one selection; a share is in [0, 1], NaN where it cannot be known.

    Attributes:
        n_pool: samples of the pool.
        n_scored: samples with the signals that the selector needs.
        n_selected: picks.
        share_near_zero: share of the picks whose difficulty (or mean reward, where none is known) is below 0.05.
        pool_share_near_zero: the same share of the scored pool.
        learnability_near_zero: share of the scored pool with a learnability below 0.05.
        n_separated: samples that learnability lifts above that.
        learnability_weight: share of the variance of alpha L + R that L brings, Cov(alpha L, score) / Var(score);
            for a selector whose beta is 1.
        correlation: Pearson's, of L and R.
        novelty_share: share of the picks that alpha L + R alone would not have picked.
        coverage: share of the pool's distinct values that the picks have too, by column (users, items).
        warnings: what is wrong with the scores, each with what to do.
    """

    n_pool: int
    n_scored: int
    n_selected: int
    share_near_zero: float
    pool_share_near_zero: float
    learnability_near_zero: float
    n_separated: int
    learnability_weight: float
    correlation: float
    novelty_share: float
    coverage: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures for JSON, with None for NaN."""
        return {name: _no_nan(value) for name, value in asdict(self).items()}


def diagnose(
    ledger: SelectionLedger, samples: pd.DataFrame | None = None, situation: Situation | None = None
) -> Diagnostics:
    """Computes the figures of a selection and warns of what makes it worth less than it seems.

    Args:
        ledger: of the selection.
        samples: what else is known of the pool: a column `sample_id`, and `user_id`, `item_id` or others, of which the
            coverage is stated.
        situation: how the selection came about, so that the warnings advise what helps there; None knows the ledger
            alone.

    Raises:
        InputError: If `samples` lacks `sample_id` or a sample of the ledger.

    Example:
        >>> diagnose(SelectionLedger.from_parquet("ledger.parquet")).warnings  # doctest: +SKIP
        ["learnability is below 0.05 for 97 % of the pool, ..."]
    """
    columns = ledger.columns
    picked = columns["rank"] > 0
    scored = ~np.isnan(columns["learnability"])
    learn, represent, score = (columns[name][scored] for name in ("learnability", "representativeness", "score"))
    easiness = np.where(np.isnan(columns["difficulty"]), columns["reward_mean"], columns["difficulty"])
    known = ~np.isnan(easiness)
    found = Diagnostics(
        n_pool=len(ledger),
        n_scored=int((columns["reason"] != NEVER_SCORED).sum()),
        n_selected=ledger.n_selected,
        share_near_zero=_share(easiness[picked] < NEAR_ZERO, known[picked]),
        pool_share_near_zero=_share(easiness < NEAR_ZERO, known),
        learnability_near_zero=_share(learn < NEAR_ZERO, ~np.isnan(learn)),
        n_separated=int((learn >= NEAR_ZERO).sum()),
        learnability_weight=_variance_share(score - represent, score),
        correlation=_correlation(learn, represent),
        novelty_share=_novelty_share(columns),
        coverage={} if samples is None else _coverage(ledger, samples),
    )
    if ledger.options.get("signals") == "predicted":  # the warnings advise on scores, and none were taken
        return found
    name = str(ease_of(ledger).name)
    found.warnings = _warnings(found, learn, represent, name, Remedies(ledger, situation or Situation()))
    return found


def _warnings(found: Diagnostics, learn: Floats, represent: Floats, name: str, remedies: Remedies) -> list[str]:
    said: list[str] = []
    if not len(learn):
        return said
    if remedies.uses_learnability and found.learnability_near_zero >= MOST:
        said.append(
            f"learnability is below {NEAR_ZERO} for {found.learnability_near_zero:.0%} of the scored pool and "
            f"separates {found.n_separated} of {len(learn)} samples; the {name} of most is far from mu, so "
            f"representativeness and novelty decide: {remedies.against_flat_learnability(equal=False)}"
        )
    elif remedies.uses_learnability and len(learn) > 1 and _flat(learn):
        said.append(
            f"learnability is the same for all samples, so it decides nothing; their {name} tells none from another: "
            f"{remedies.against_flat_learnability(equal=True)}"
        )
    if remedies.uses_representativeness and len(represent) > 1 and _flat(represent):
        said.append(
            "representativeness is the same for all samples, so it decides nothing; there are no gradients, or they "
            f"are all equal or zero: {remedies.against_flat_representativeness()}"
        )
    if found.share_near_zero >= _MANY and remedies.draws_rollouts:
        said.append(
            f"{found.share_near_zero:.0%} of the picks have a {name} below {NEAR_ZERO}, and most of their rollouts "
            f"will teach nothing: {remedies.against_hard_picks()}"
        )
    if found.novelty_share >= MOST and found.n_selected > 1:
        said.append(
            f"novelty decides {found.novelty_share:.0%} of the picks; nearly all of the samples with the best scores "
            f"were passed over for being alike: {remedies.against_much_novelty()}"
        )
    return said


def _novelty_share(columns: Mapping[str, npt.NDArray[Any]]) -> float:
    reason, score = columns["reason"], columns["score"]
    picked = reason == SELECTED
    rows = np.flatnonzero((picked | (reason == REDUNDANT) | (reason == BELOW_BUDGET)) & ~np.isnan(score))
    best = rows[np.argsort(-score[rows], kind="stable")][: int(picked[rows].sum())]
    return _share(~picked[best], np.ones(len(best), dtype=bool))


def _coverage(ledger: SelectionLedger, samples: pd.DataFrame) -> dict[str, float]:
    if "sample_id" not in samples:
        raise InputError("the table of samples has no column sample_id: give it one row per sample of the pool")
    rows = samples.set_index("sample_id")
    ids = ledger.columns["sample_id"]
    missing = ids[~np.isin(ids, rows.index)]
    if len(missing):
        raise InputError(
            f"the table of samples has no row for sample_id {int(missing[0])}: give one per sample of the pool"
        )
    pool, picks = rows.loc[ids], rows.loc[ledger.selected()]
    return {str(name): _ratio(picks[name].nunique(), pool[name].nunique(), len(pool)) for name in rows.columns}


def _share(true: Bools, known: Bools) -> float:
    return _ratio(int((true & known).sum()), int(known.sum()), int(known.sum()))


def _ratio(numerator: float, denominator: float, n: int) -> float:
    return float(numerator) / float(denominator) if n and denominator else math.nan


def _flat(values: Floats) -> bool:
    return len(values) > 0 and bool(values.min() == values.max())


def _correlation(one: Floats, other: Floats) -> float:
    if len(one) < 2 or _flat(one) or _flat(other):
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def _variance_share(part: Floats, whole: Floats) -> float:
    if len(whole) < 2 or _flat(whole):
        return math.nan
    return float(np.cov(part, whole, ddof=0)[0, 1] / whole.var())


def _no_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _no_nan(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def ease_of(ledger: SelectionLedger) -> pd.Series:
    """Returns how easy each sample is, [N] float64 in the order of the ledger, NaN where not known.

    It is the difficulty in use or, where the selector used none, the mean reward. The name of the series says in words
    what it is.
    """
    table = ledger.table
    if table["difficulty"].notna().any():
        return table["difficulty"].rename(ledger.difficulty_name)
    return table["reward_mean"].rename("mean reward")


def easiness_of(ledger: SelectionLedger) -> pd.Series:
    """Returns what a plan made from a ledger alone orders by, [N] float64 by sample_id, NaN where not known.

    It is the mean reward if rollouts were drawn for every sample that the selector knew, else `ease_of`: never some
    values of one and some of the other.
    """
    table, ease = ledger.table, ease_of(ledger)
    if bool((table["n_rollouts"][ease.notna()] > 0).all()):
        ease = table["reward_mean"].rename("mean reward")
    return ease.set_axis(table["sample_id"])


def notable(ledger: SelectionLedger, n: int = 5) -> dict[str, pd.DataFrame]:
    """Returns the rows of a ledger that a report shows, with `ease` of `ease_of` added.

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
