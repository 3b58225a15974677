"""The tidy table of a study as means, intervals and differences, and printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from minirec_pl.cli.compare.intervals import Interval, paired_interval, t_interval

FIGURE = "ndcg@10"
RUN = ["dataset", "window", "method", "setting", "budget", "seed"]
ARM = ["dataset", "window", "method", "setting", "budget"]
ALL_WINDOWS = "all"
COSTS = ("tokens", "tokens_warm_start", "tokens_scoring", "tokens_training", "rollouts", "seconds")


def chosen_points(frame: pd.DataFrame) -> pd.DataFrame:
    """Picks one row per run: the evaluation point with the best validation NDCG@10, the earliest of equals.

    Args:
        frame: tidy table, see `minirec_pl.cli.compare.results.tidy`.

    Returns:
        `RUN`, the point's `epoch`, `validation` and `test` (NaN where test was left alone), `hit_rate` of the same
        split, what had been spent by then, and `tokens_total`, what the whole run spent.
    """
    plain = frame.astype(dict.fromkeys(("dataset", "window", "method", "setting", "split"), str))
    wide = plain[plain["split"] == "validation"].set_index([*RUN, "epoch"])
    test = plain[plain["split"] == "test"].set_index([*RUN, "epoch"])
    made = wide[list(COSTS)].astype("float64")
    made["validation"], made["test"] = wide[FIGURE], test[FIGURE]
    made["hit_rate"] = test["hit_rate@10"].reindex(made.index).fillna(wide["hit_rate@10"])
    made = made.reset_index().sort_values([*RUN, "epoch"], kind="stable")
    made["tokens_total"] = made.groupby(RUN)["tokens"].transform("max")
    best = made.groupby(RUN, sort=False)["validation"].idxmax()
    return made.loc[best].reset_index(drop=True)


def with_all_windows(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds, for data sets of several windows, runs of the window `all`: the mean of the windows, by seed."""
    several = [name for name, part in runs.groupby("dataset") if part["window"].nunique() > 1]
    part = runs[runs["dataset"].isin(several)]
    by = [name for name in RUN if name != "window"]
    whole = part.groupby(by)["window"].transform("nunique") == part.groupby("dataset")["window"].transform("nunique")
    mean = part[whole].groupby(by, as_index=False).mean(numeric_only=True).assign(window=ALL_WINDOWS)
    return pd.concat([runs, mean], ignore_index=True)


def comparison(frame: pd.DataFrame, references: Sequence[str]) -> pd.DataFrame:
    """Computes means with intervals over seeds, and differences to the references, paired by seed.

    Args:
        frame: tidy table.
        references: methods; those that take a budget are compared at the same budget, others with their whole pool.

    Returns:
        A row per data set, window, method, setting and budget: `seeds`, means of what was spent, `figure` (test NDCG@10
        at the point chosen on validation, or validation where test was left alone) with `_low` and `_high`, and
        `minus_<reference>` likewise.
    """
    runs = with_all_windows(chosen_points(frame))
    runs["figure"] = runs["test"].fillna(runs["validation"])
    rows = []
    for arm, part in runs.groupby(ARM, sort=False):
        row = dict(zip(ARM, arm, strict=True)) | {"seeds": len(part), "epoch": part["epoch"].mean()}
        row |= {name: part[name].mean() for name in (*COSTS, "tokens_total", "hit_rate")}
        row |= interval_columns("figure", t_interval(part["figure"].to_numpy()))
        for name in references:
            row |= interval_columns(f"minus_{name}", _difference(runs, part, name))
        rows.append(row)
    return pd.DataFrame(rows)


def tables_of(frame: pd.DataFrame, references: Sequence[str]) -> list[Table]:
    """Makes a table for the terminal per data set and window."""
    compared = comparison(frame, references)
    tables = []
    for (dataset, window), part in compared.groupby(["dataset", "window"], sort=False):
        split = "test" if (frame["split"] == "test").any() else "validation"
        table = Table(
            title=f"{dataset} {window}: NDCG@10 on {split}, epoch chosen on validation, 95 % over seeds".strip()
        )
        names = (
            "method",
            "budget",
            "seeds",
            "NDCG@10",
            *(f"minus {name}" for name in references),
            "M tokens",
            "rollouts",
            "s",
        )
        for name in names:
            table.add_column(name, justify="left" if name == "method" else "right")
        for row in part.to_dict("records"):
            method = f"{row['method']} @ {row['setting']}" if row["setting"] else row["method"]
            table.add_row(
                method,
                f"{row['budget']:.1%}",
                str(row["seeds"]),
                cell(_interval(row, "figure")),
                *(cell(_interval(row, f"minus_{name}"), signed=True) for name in references),
                f"{row['tokens'] / 1e6:.2f}",
                f"{row['rollouts']:,.0f}",
                f"{row['seconds']:.0f}",
            )
        tables.append(table)
    return tables


def cell(interval: Interval, signed: bool = False) -> str:
    """Formats `mean [low, high]` for a table; a dash where there is nothing."""
    if interval.n == 0:
        return "–"
    sign = "+" if signed else ""
    mean = f"{interval.mean:{sign}.4f}"
    return mean if np.isnan(interval.low) else f"{mean} [{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]"


def _difference(runs: pd.DataFrame, part: pd.DataFrame, reference: str) -> Interval:
    own = part.iloc[0]
    if own["method"] == reference:
        return t_interval([])
    same = (runs["dataset"] == own["dataset"]) & (runs["window"] == own["window"]) & (runs["method"] == reference)
    rival = runs[same]
    if (rival["budget"] < 1).any():
        rival = rival[rival["budget"] == own["budget"]]
    rival = rival[(rival["setting"] == own["setting"])]
    paired = part.merge(rival, on="seed", suffixes=("", "_rival"))
    return paired_interval(paired["figure"].to_numpy(), paired["figure_rival"].to_numpy())


def interval_columns(name: str, interval: Interval) -> dict[str, float | int]:
    """Makes columns of an interval: its mean, bounds and number of values."""
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high, f"{name}_n": interval.n}


def _interval(row: dict[Any, Any], name: str) -> Interval:
    return Interval(row[name], row[f"{name}_low"], row[f"{name}_high"], int(row[f"{name}_n"]))
